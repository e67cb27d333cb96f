"""Several models over the same weights: each has its own modules, head and adapters, and no weight twice.

Adapters are put into the modules of a model, so two tasks whose models share only tensors cannot touch each
other: what one attaches, fuses or routes is not there for the other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from graftlm.core.errors import ModelError
from graftlm.models.architecture import concrete, family_of
from graftlm.models.ending import TEXT, Ending
from graftlm.models.heads import begin_head, ended, head_modules, is_for, stored_ending
from graftlm.models.streaming.streamed import RESIDENT, placement_of
from graftlm.quant.facts import device_of, dtype_of


def sibling(model: Any, own: Ending, wanted: Ending) -> Any:
    """Another model over the weights of `model`, with the ending `wanted`.

    A head that `model` does not have is drawn as it is when the base is loaded with that ending: the same
    numbers, by the ending's seed.

    Args:
        model: as it was loaded, without adapters.
        own: the ending that it was loaded with.

    Raises:
        ModelError: layers that are streamed; an ending that only the checkpoint has, or nothing has.
    """
    placement, _ = placement_of(model)
    if placement != RESIDENT:
        raise ModelError(
            f"The layers of this base come from {placement} one by one.",
            meaning="Several tasks share weights that lie in memory.",
            fix="Set model.placement to resident, or tune the tasks one after the other.",
        )
    if wanted == own or wanted.kind == own.kind == TEXT.kind:
        return _copied(model)
    return _with_head(model, own, wanted)


class Siblings(nn.Module):
    """Models over the same weights, by name, as one module: what the training loop trains.

    >>> both = Siblings({"one": nn.Linear(2, 2), "train": nn.Linear(2, 2)})
    >>> [name for name, _ in both.named_parameters()]
    ['@one.weight', '@one.bias', '@train.weight', '@train.bias']
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, model in models.items():
            self.add_module(path_of(name), model)


def path_of(name: str) -> str:
    """Where the model of that name stands: `@` keeps clear of the names that a module has itself."""
    return f"@{name}"


def _copied(model: Any) -> Any:
    """The modules once more, with the very same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _with_head(model: Any, own: Ending, wanted: Ending) -> Any:
    """A model of another class over the same backbone."""
    name = str(model.config._name_or_path)
    _require_possible(model, own, wanted, name)
    config = ended(model.config, wanted)
    chosen, config = concrete(family_of(config, name, wanted), config)
    with torch.device("meta"):
        found = cast(Any, chosen(config))
    found.config._name_or_path = name
    prefix = found.base_model_prefix
    new = _take_backbone(found, model, prefix)
    outside = [path for path, _ in found.named_children() if path != prefix]
    for path in (*outside, *new):
        found.get_submodule(path).to_empty(device="cpu")
    found.eval()
    absent = [f"{path}.weight" for path in new]
    begin_head(found, {"missing_keys": absent, "mismatched_keys": [], "unexpected_keys": []}, wanted)
    for path in (*outside, *new):
        found.get_submodule(path).to(device=device_of(model), dtype=dtype_of(model))
    return found


def _require_possible(model: Any, own: Ending, wanted: Ending, name: str) -> None:
    if wanted.kind == TEXT.kind:
        raise ValueError("a base is loaded to write text where any task wants that")
    stored = stored_ending(model.config)
    if stored.kind != TEXT.kind and is_for(stored, wanted):
        raise ModelError(
            f"{name} has a head for {', '.join(wanted.labels)}, and another task comes first.",
            meaning="That head was not loaded; a new one in its place would know nothing.",
            fix="Put the task with the labels of this checkpoint first.",
        )
    if model.base_model is model:
        raise ModelError(
            f"{type(model).__name__} has no backbone of its own.",
            meaning=f"Its layers cannot stand under a head that labels {wanted.kind} besides.",
            fix="Tune the tasks one after the other.",
        )


def _take_backbone(found: Any, model: Any, prefix: str) -> list[str]:
    """Put the backbone of `model` into `found`; gives the paths of what is new in it, without memory yet.

    Backbones of some encoders have a pooler for the sake of the head; one that was drawn with another head
    is drawn again with this one.
    """
    drawn = {path.removeprefix(f"{prefix}.") for path in head_modules(model) if path.startswith(f"{prefix}.")}
    wants = getattr(found, prefix)
    backbone = _copied(model.base_model)
    new = []
    for name, child in wants.named_children():
        if name in drawn:
            setattr(backbone, name, child)
            new.append(f"{prefix}.{name}")
        elif getattr(backbone, name, None) is None:
            raise ModelError(
                f"The base was loaded without {prefix}.{name}, which {type(found).__name__} needs.",
                meaning="The task that comes first has no use for it.",
                fix="Put a task that labels rows first.",
            )
    for name, _ in list(backbone.named_children()):
        if getattr(wants, name, None) is None:
            setattr(backbone, name, None)
    setattr(found, prefix, backbone)
    return new
