"""The optimizer with named groups, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError
from graftlm.training.interfaces import OptimSettings
from graftlm.training.low_bit_optim import FORMS, make_low_bit

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def learning_rate(step: int, total_steps: int, settings: OptimSettings) -> float:
    """Learning rate of the update that follows `step` finished ones (so 0 is the first).

    Warm-up takes ceil(warmup_ratio x total_steps) steps and rises to the full rate without ever being
    zero: (step + 1) / (warm-up + 1). After it, `linear` and `cosine` fall towards zero, which they would
    reach at `total_steps`: no update is wasted. `constant` has no warm-up.

    >>> from types import SimpleNamespace
    >>> s = SimpleNamespace(learning_rate=1.0, lr_scheduler_type="linear", warmup_ratio=0.25)
    >>> [round(learning_rate(step, 4, s), 3) for step in range(4)]
    [0.5, 1.0, 0.667, 0.333]

    Raises:
        ConfigError: unknown schedule.
    """
    kind = settings.lr_scheduler_type
    if kind not in SCHEDULES:
        raise ConfigError(
            f"Unknown lr_scheduler_type {kind!r}{suggest(kind, SCHEDULES)}.",
            fix=f"Choose one of {', '.join(SCHEDULES)}.",
        )
    peak = settings.learning_rate
    warmup = 0 if kind == "constant" else math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if kind == "linear":
        return peak * (1.0 - done)
    if kind == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak


def make_optimizer(
    named_parameters: Mapping[str, nn.Parameter],
    settings: OptimSettings,
    *,
    lora_b: Callable[[str], bool] | Collection[str] = (),
    scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW over the given parameters; weight decay acts on matrices only (two or more dimensions).

    Args:
        named_parameters: all that is trained, by name.
        settings: rates, and which AdamW (`optim`); with `loraplus_lr_ratio` the parameters in `lora_b` get
            the learning rate times that ratio (LoRA+, arXiv:2402.12354).
        scales: name -> what the learning rate is multiplied by, where it is not 1.
        lora_b: the names of the LoRA B matrices, or a function that tells them.

    Raises:
        ConfigError: nothing to train, a parameter that cannot be trained, LoRA+ without any B matrix, or an
            unknown optimizer.
        MissingDependency: the optimizer needs bitsandbytes.
    """
    _require_trainable(named_parameters)
    is_b = lora_b if callable(lora_b) else frozenset(lora_b).__contains__
    ratio = settings.loraplus_lr_ratio
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters.items():
        key = (ratio is not None and is_b(name), parameter.ndim >= 2, (scales or {}).get(name, 1.0))
        groups.setdefault(key, []).append(parameter)
    if ratio is not None and not any(fast for fast, *_ in groups):
        raise ConfigError(
            f"loraplus_lr_ratio is {ratio}, but no trained parameter is a LoRA B matrix.",
            meaning="LoRA+ speeds up the B matrices of LoRA and DoRA only.",
            fix="Remove train.loraplus_lr_ratio, or use method.type: lora.",
        )
    made = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if matrix else 0.0,
            "lr_scale": scale * (ratio or 1.0) if fast else scale,
        }
        for (fast, matrix, scale), parameters in groups.items()
    ]
    return _of_kind(settings.optim, made, settings.learning_rate, list(named_parameters.values()))


def _of_kind(
    name: str, groups: list[dict[str, Any]], rate: float, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    if name in FORMS:
        return make_low_bit(name, groups, rate, parameters[0].device)
    if name != "adamw":
        known = ("adamw", *FORMS)
        raise ConfigError(
            f"Unknown optim {name!r}{suggest(name, known)}.", fix=f"Choose one of {', '.join(known)}."
        )
    return torch.optim.AdamW(groups, lr=rate, **_implementation(parameters))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its own scale (LoRA+)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _implementation(parameters: list[nn.Parameter]) -> dict[str, Any]:
    """One fused kernel where all tensors allow it (3x faster than foreach on a CPU), else foreach."""
    same_device = len({parameter.device for parameter in parameters}) == 1
    fused = same_device and parameters[0].device.type in ("cpu", "cuda")
    return {"fused": True} if fused else {"foreach": True}


def _require_trainable(named_parameters: Mapping[str, nn.Parameter]) -> None:
    frozen = [name for name, parameter in named_parameters.items() if not parameter.requires_grad]
    if frozen or not named_parameters:
        raise ConfigError(
            f"{len(frozen)} parameters to train are frozen." if frozen else "There is nothing to train.",
            problems=frozen[:10],
            meaning="The optimizer would never change them.",
            fix="Attach an adapter and make it trainable (adapters.train_only) before training.",
        )
