"""What a diagnosis needs to know of somebody's own training loop: written beside the adapter while it runs.

    note_training(model, "out", optimizer)      # before the first step
    note_evaluation(model, "out", batch)        # while the model is evaluated

Models of PEFT and of Graft. With `transformers.Trainer`, `DiagnosisCallback` does both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import FormatError
from graftlm.core.files import write_atomic
from graftlm.diagnosis.facts.structure import LoopState
from graftlm.methods.attach import adapters_of

STATE = "graft-state.json"
SHOWN = 5
STATUS = ("enabled", "active_adapters", "merged_adapters", "requires_grad")
"""Fields of PEFT's model status that are `irregular` where layers differ."""


def note_training(model: nn.Module, folder: str | Path, optimizer: torch.optim.Optimizer) -> LoopState:
    """Look at the model and its optimizer before the first step, and keep what is seen in `folder`.

    Raises:
        FormatError: an earlier note in the folder is damaged.
    """
    before = read_state(Path(folder)) or LoopState(0)
    found = _with_optimizer(model, optimizer)
    return _kept(
        replace(found, dropouts=before.dropouts, repeat_difference=before.repeat_difference), Path(folder)
    )


def note_evaluation(
    model: nn.Module, folder: str | Path, inputs: Mapping[str, Tensor] | None = None
) -> LoopState:
    """Look at the model as it stands when it is evaluated, and keep what is seen in `folder`.

    Args:
        inputs: of the model's forward; its logits are computed twice and compared.

    Raises:
        FormatError: an earlier note in the folder is damaged.
    """
    before = read_state(Path(folder)) or LoopState(_trainable(model))
    found = replace(
        before, active=_active(model), irregular=_irregular(model), dropouts=_active_dropouts(model)
    )
    if inputs is not None:
        found = replace(found, repeat_difference=_difference(model, inputs))
    return _kept(found, Path(folder))


def read_state(folder: Path) -> LoopState | None:
    """The note in a folder; None where there is none.

    Raises:
        FormatError: it is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return LoopState.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError):
        raise FormatError(
            f"{path} does not describe a training loop.",
            meaning="It was edited or damaged.",
            fix="Remove it, or write it again.",
        ) from None


def _kept(found: LoopState, folder: Path) -> LoopState:
    write_atomic(folder / STATE, json.dumps(found.as_dict(), indent=2) + "\n")
    return found


def _trainable(model: nn.Module) -> int:
    return sum(parameter.requires_grad for parameter in model.parameters())


def _with_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> LoopState:
    own = {id(parameter) for parameter in model.parameters()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    unknown = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    return LoopState(
        trainable=_trainable(model),
        unknown=len(unknown),
        stale=len(held - own),
        active=_active(model),
        optimised=_adapters_in(model, held),
        irregular=_irregular(model),
        examples=tuple(unknown[:SHOWN]),
    )


def _active(model: nn.Module) -> tuple[str, ...]:
    ours = adapters_of(model)
    if ours is not None:
        return ours.active
    found = getattr(model, "active_adapters", ())
    return tuple(found() if callable(found) else found)


def _adapters_in(model: nn.Module, held: set[int]) -> tuple[str, ...]:
    """Adapters of which the optimizer holds tensors. In PEFT a tensor has the adapter's name in its own."""
    ours = adapters_of(model)
    if ours is not None:
        return tuple(name for name in ours.names if any(id(p) in held for p in ours.parameters(name)))
    parts = {part for name, p in model.named_parameters() if id(p) in held for part in name.split(".")}
    return tuple(name for name in getattr(model, "peft_config", {}) if name in parts)


def _irregular(model: nn.Module) -> tuple[str, ...]:
    """What differs from layer to layer, as PEFT tells it; in a model of Graft nothing can."""
    status = getattr(model, "get_model_status", None)
    if adapters_of(model) is not None or status is None:
        return ()
    found = status()
    return tuple(name for name in STATUS if _is_irregular(getattr(found, name, None)))


def _is_irregular(value: Any) -> bool:
    return "irregular" in (value.values() if isinstance(value, Mapping) else (value,))


def _active_dropouts(model: nn.Module) -> int:
    kinds = (nn.Dropout, nn.AlphaDropout, nn.Dropout1d, nn.Dropout2d)
    return sum(module.training and module.p > 0 for module in model.modules() if isinstance(module, kinds))


@torch.no_grad()
def _difference(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Between two computations of the same logits, with the model as it stands."""
    one, other = (model(**inputs).logits.float() for _ in range(2))
    found = float((one - other).abs().max())
    return found if math.isfinite(found) else -1.0
