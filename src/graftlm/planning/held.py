"""Bytes that stay through a run: the base as it is stored, what is trained, and what the optimizer keeps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graftlm.methods.site import Site
from graftlm.planning.memory_setup import Setup
from graftlm.planning.stand_in import NAME, base_of, with_adapter
from graftlm.quant.facts import is_packed
from graftlm.training.memory_classes import DENSE, EMBEDDINGS, EXPERTS, QUANTISED, TRAINED, base_classes

LAYERS_THERE = 2
"""Of a base whose layers come when they are needed: the one at work and the next."""


@dataclass(frozen=True)
class Held:
    """Bytes that stay."""

    base: tuple[tuple[str, int], ...]
    """Of the frozen tensors, by class."""
    trained: int
    gradients: int
    state: int
    adapted: int
    """Of the dense weights that a merge changes, and keeps a copy of."""
    largest: int
    """Values of the largest linear layer."""

    @property
    def weights(self) -> int:
        """Of the base."""
        return sum(size for _, size in self.base)


_known: dict[tuple[object, ...], Held] = {}


def held_bytes(setup: Setup) -> Held:
    """What stays on the device that computes."""
    key = (*setup.key, setup.optimizer, setup.placement, setup.embeddings)
    if key not in _known:
        _known[key] = _counted(setup)
    return _known[key]


def _counted(setup: Setup) -> Held:
    model = base_of(setup.facts, setup.scheme, setup.dtype)
    trained = {} if setup.config is None else with_adapter(model, setup.config).named_parameters(NAME)
    found = {one.name: one.bytes for one in base_classes(model, trained)}
    own = found.pop(TRAINED, 0)
    if setup.placement != "resident":
        share = min(1.0, LAYERS_THERE / max(1, setup.facts.layers))
        found |= {name: round(found[name] * share) for name in (QUANTISED, DENSE, EXPERTS) if name in found}
    if setup.embeddings == "host":
        found.pop(EMBEDDINGS, None)
    layers = [module for module in model.modules() if isinstance(module, Site)]
    adapted = sum(_dense_bytes(site.base_layer) for site in layers)
    largest = max((shape.rows * shape.columns for shape in setup.facts.linears if shape.in_block), default=0)
    state = sum(_state(parameter.numel(), setup.optimizer) for parameter in trained.values())
    return Held(tuple(found.items()), own, own, state, adapted, largest)


def _dense_bytes(layer: nn.Module) -> int:
    weight = None if is_packed(layer) else layer._parameters.get("weight")
    return 0 if weight is None or weight.dim() != 2 else weight.numel() * weight.element_size()


def _state(values: int, optimizer: str) -> int:
    """Two moments of AdamW in float32, or in codes of 8 bits with a scale for 256 of them."""
    if "8bit" in optimizer and values >= 4096:
        return 2 * (values + 4 * -(-values // 256))
    return 2 * 4 * values + 4
