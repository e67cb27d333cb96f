"""Where activations can be recomputed: layers and feed-forward parts, by the structure of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graftlm.methods.families import Block, blocks_of
from graftlm.methods.site import base_modules

SWITCH = "gradient_checkpointing"
"""The attribute by which modules of `transformers` say that they can be checkpointed."""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward part that is a module of its own, and the module in it that ends it, as it is called."""

    module: nn.Module
    end: nn.Module


@dataclass(frozen=True)
class Places:
    """What a model has."""

    layers: tuple[nn.Module, ...]
    """Numbered blocks that have a switch, in the order of the model."""
    feed_forwards: tuple[FeedForward, ...]
    """At most one of each block: experts, for instance, are called in another way."""


def places_of(model: nn.Module) -> Places:
    """Layers and feed-forward parts of a model, with adapters in it or without."""
    modules = base_modules(model)
    blocks = blocks_of(model)
    layers = [layer for block in blocks if hasattr(layer := modules[block.path], SWITCH)]
    parts = [part for block in blocks if (part := _feed_forward(block, modules)) is not None]
    return Places(tuple(layers), tuple(parts))


def _feed_forward(block: Block, modules: dict[str, nn.Module]) -> FeedForward | None:
    if block.mixture or len(block.feed_forwards) != 1:
        return None
    (part,) = block.feed_forwards
    path, _, name = part.output.rpartition(".")
    is_own_module = path != block.path and all(inner.rpartition(".")[0] == path for inner in part.inputs)
    if not is_own_module:
        return None
    module = modules[path]
    end = module._modules[name]
    return None if end is None else FeedForward(module, end)
