"""Norms and gated feed-forward parts of a model that compute in one operator, for the time of a training.

A module qualifies by what it computes: a probe must give the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.kernels.pointwise import gated_silu, rms_norm
from graftlm.methods.site import base_modules
from graftlm.quant.facts import device_of, dtype_of

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fusable:
    """The modules that can run fused, with what they then do, and how many of each kind there are."""

    forwards: Mapping[nn.Module, Forward]
    norms: int
    feed_forwards: int

    @property
    def summary(self) -> str:
        """One line.

        >>> Fusable({}, norms=5, feed_forwards=2).summary
        '0 of 5 norms, 0 of 2 gated feed-forward parts'
        """
        norms = sum(map(_is_norm, self.forwards))
        parts = len(self.forwards) - norms
        return f"{norms} of {self.norms} norms, {parts} of {self.feed_forwards} gated feed-forward parts"


def fusable(model: nn.Module) -> Fusable:
    """RMS norms with frozen weights and SiLU-gated feed-forward parts, found and probed."""
    own = [module for module in model.modules() if "forward" not in vars(module)]
    norms = {module: _fused_norm(module) for module in own if _is_norm(module)}
    parts = {module: _fused_feed_forward(module) for module in own if _is_gated(module)}
    return Fusable(_agreeing(norms | parts), len(norms), len(parts))


@contextmanager
def fused(found: Fusable) -> Iterator[None]:
    """Inside, these modules run fused, outside as before: the same outputs and gradients within rounding."""
    for module, forward in found.forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in found.forwards:
            del module.forward  # the one of its class is back


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.dim() == 1 and not weight.requires_grad
    return is_vector and "RMSNorm" in type(module).__name__


def _fused_norm(module: Any) -> Forward:
    plain: Forward = module.forward
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 0.0)

    def forward(hidden_states: Tensor) -> Tensor:
        weight = module.weight
        fits = weight.dtype == hidden_states.dtype and not weight.requires_grad
        return rms_norm(hidden_states, weight, eps) if fits else plain(hidden_states)

    return forward


def _is_gated(module: nn.Module) -> bool:
    children = module._modules
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(children.get(name) is not None for name in names) and _is_silu(children["act_fn"])


def _is_silu(module: nn.Module | None) -> bool:
    return type(module).__name__ in ("SiLU", "SiLUActivation")


def _fused_feed_forward(module: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        down: Tensor = module.down_proj(gated_silu(module.gate_proj(x), module.up_proj(x)))
        return down

    return forward


def _agreeing(candidates: Mapping[nn.Module, Forward]) -> dict[nn.Module, Forward]:
    """Those whose class passed the probe: one module of it stands for all."""
    passed: dict[type[nn.Module], bool] = {}
    for module, forward in candidates.items():
        if type(module) not in passed:
            passed[type(module)] = _agrees(module, forward)
    return {module: forward for module, forward in candidates.items() if passed[type(module)]}


@torch.no_grad()
def _agrees(module: Any, forward: Forward) -> bool:
    """Whether both give the same on a few rows, small and large (some models clamp), with everything random
    switched off. Products of 16-bit matrices need not repeat to the last bit."""
    first = module if _is_norm(module) else base_modules(module)["gate_proj"]
    width = len(module.weight) if _is_norm(module) else module.gate_proj.in_features
    values = torch.linspace(-2.0, 2.0, 3 * width).view(3, width) * torch.tensor([[1.0], [10.0], [200.0]])
    x = values.to(device=device_of(first), dtype=dtype_of(first))
    was_training = module.training
    module.eval()
    try:
        expected, found = module(x), forward(x)
    except (TypeError, ValueError, RuntimeError):  # it takes more than one tensor
        return False
    finally:
        module.train(was_training)
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    difference, size = (found - expected).float().norm(dim=-1), expected.float().norm(dim=-1)
    return bool((difference <= 2 * torch.finfo(x.dtype).eps * size).all())
