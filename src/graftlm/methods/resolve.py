"""The first half of attaching: what would be done, worked out without touching the model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graftlm.core.errors import AdapterError
from graftlm.methods import targets
from graftlm.methods.base import Layer, Maker, MethodConfig, ModelAdapter, Part
from graftlm.methods.copies import FullCopy, owners, refuse_packed
from graftlm.methods.site import base_modules, parents
from graftlm.quant.facts import is_in_few_bits, on_meta


@dataclass(frozen=True)
class Placement:
    """One part to be made at one place."""

    layer: Layer
    parameters: int
    """Trainable numbers that it adds."""
    is_of_stack: bool
    """It acts on a whole stack of layers and leaves the modules inside alone."""
    make: Maker = field(repr=False)

    @property
    def path(self) -> str:
        return self.layer.path

    def build(self, dtype: torch.dtype | None = torch.float32) -> Part:
        """The part itself, with memory, on the base layer's device; None for the base layer's dtype."""
        layer = self.layer
        return self.make(layer).to(layer.device, dtype or layer.dtype)


@dataclass(frozen=True)
class Resolution:
    """Everything that attaching a config would add."""

    config: MethodConfig
    placements: tuple[Placement, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(placement.path for placement in self.placements)

    @property
    def parameters(self) -> int:
        """Trainable numbers in all."""
        return sum(placement.parameters for placement in self.placements)

    @property
    def bytes(self) -> int:
        """Bytes of the adapter in float32, as it is trained."""
        return 4 * self.parameters


def resolve(model: nn.Module, config: MethodConfig, *, sites: Collection[str] = ()) -> Resolution:
    """What attaching `config` to `model` would do. Pure: no change, no memory for adapters.

    `sites` are the paths at which other adapters stand already.

    Raises:
        TargetError: targets match nothing, or nothing that can be adapted; all problems at once.
        AdapterError: sites would lie inside each other.

    >>> from graftlm.methods.lora import LoraConfig
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    >>> resolution = resolve(model, LoraConfig(r=2, target_modules=["0"]))
    >>> resolution.paths, resolution.parameters
    (('0',), 20)
    """
    modules = base_modules(model)
    blocks = targets.named(model, config.modules_to_save or (), "modules_to_save")
    refuse_packed({path: module for path, module in modules.items() if _is_inside(path, blocks)})
    makers: dict[str, Maker] = {
        path: maker for path, maker in config.places(model).items() if not _is_inside(path, blocks)
    }
    makers |= {path: _copy for path in owners(modules) if _is_inside(path, blocks)}
    layers = [Layer(path, modules[path]) for path in modules if path in makers]
    placements = tuple(_placements(config, layers, makers))
    _refuse_nesting(placements, sites)
    return Resolution(config, placements)


def _placements(
    config: MethodConfig, layers: Sequence[Layer], makers: Mapping[str, Maker]
) -> Iterator[Placement]:
    """Count parameters by building on the meta device, where nothing takes memory; shared ones count once."""
    stand_ins: dict[int, nn.Parameter] = {}
    parts = {layer.path: _on_meta(layer, makers[layer.path], stand_ins) for layer in layers}
    config.link(parts)
    counted: set[int] = set()
    for layer in layers:
        part = parts[layer.path]
        own = {id(p): p.numel() for p in part.parameters() if id(p) not in counted}
        counted |= own.keys()
        yield Placement(layer, sum(own.values()), isinstance(part, ModelAdapter), makers[layer.path])


def _on_meta(layer: Layer, make: Maker, stand_ins: dict[int, nn.Parameter]) -> Part:
    """The part without memory; `stand_ins` of the base's parameters, which layers may share, by their id.

    What is in few bits is stood in for by the dense module that it stands for itself.
    """
    packed = [module for module in layer.module.modules() if is_in_few_bits(module)]
    theirs = {id(p) for module in packed for p in module.parameters()}
    own = [p for p in layer.module.parameters() if id(p) not in theirs]
    for p in own:
        if id(p) not in stand_ins:
            meta = torch.empty_like(p, device="meta")
            stand_ins[id(p)] = nn.Parameter(meta, requires_grad=p.requires_grad)
    memo: dict[int, Any] = {id(p): stand_ins[id(p)] for p in own} | {id(m): on_meta(m) for m in packed}
    with torch.device("meta"):
        return make(Layer(layer.path, copy.deepcopy(layer.module, memo)))


def _copy(layer: Layer) -> Part:
    return FullCopy(layer.module)


def _is_inside(path: str, others: list[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in others)


def _refuse_nesting(placements: Sequence[Placement], existing: Collection[str]) -> None:
    """A site of one adapter inside the full copy of another would be bypassed where the copy answers."""
    paths = [placement.path for placement in placements if not placement.is_of_stack]
    mine = set(paths)
    nested = [(p, outer) for p in paths for outer in parents(p) if outer in mine or outer in existing]
    nested += [(p, outer) for p in existing for outer in parents(p) if outer in mine]
    if nested:
        raise AdapterError(
            "Some targets lie inside others.",
            problems=[f"{inner} lies inside {outer}" for inner, outer in dict.fromkeys(nested)],
            meaning="A module that one adapter copies whole cannot be adapted layer by layer by another.",
            fix="Take the outer module out of modules_to_save, or exclude the inner one.",
        )
