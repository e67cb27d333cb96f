"""Activation checkpointing with a cache that layers only read.

Checkpointed layers of `transformers` drop the cache that they are given, since a layer that is computed
again in backward would write to it twice. A view that keeps nothing can be read twice, so it is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import Cache

from graftlm.core.errors import ModelError
from graftlm.methods.virtual.stacks import argument_names

FUNCTION = "_gradient_checkpointing_func"
CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")


class WithCache:
    """A checkpoint function that hands `cache` to the layer it is called for."""

    def __init__(self, original: Callable[..., Any], layer: nn.Module, cache: Cache) -> None:
        self.original, self.layer, self.cache = original, layer, cache

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        names = argument_names(self.layer)
        name = next((name for name in CACHE_ARGUMENTS if name in names), None)
        if name is None or not isinstance(function, partial) or _is_reentrant(self.original):
            raise ModelError(
                f"A prefix cannot pass through the checkpointing of {type(self.layer).__name__}.",
                meaning="Re-entrant checkpoints lose the gradients of everything but a layer's own input."
                if _is_reentrant(self.original)
                else "Its layers are checkpointed in a way of their own.",
                fix="model.gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                '{"use_reentrant": False}), or train without checkpointing.',
            )
        place = names.index(name)
        if name not in function.keywords and place < len(args):
            args = (*args[:place], self.cache, *args[place + 1 :])
            return self.original(function, *args)
        given = partial(function.func, *function.args, **{**function.keywords, name: self.cache})
        return self.original(given, *args)


def is_checkpointed(stack: nn.Module) -> bool:
    """Whether the layers of this stack drop their activations in this call."""
    return bool(_layers(stack))


def give(stack: nn.Module, cache: Cache) -> None:
    """Let every checkpointed layer read `cache` until `take_back`."""
    for layer in _layers(stack):
        setattr(layer, FUNCTION, WithCache(getattr(layer, FUNCTION), layer, cache))


def take_back(stack: nn.Module) -> None:
    """The inverse of `give`, also after a call that failed half-way."""
    for module in stack.modules():
        function = module.__dict__.get(FUNCTION)
        if isinstance(function, WithCache):
            setattr(module, FUNCTION, function.original)


def _layers(stack: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in stack.modules()
        if module.training and getattr(module, "gradient_checkpointing", False) and FUNCTION in vars(module)
    ]


def _is_reentrant(function: Callable[..., Any]) -> bool:
    return isinstance(function, partial) and bool(function.keywords.get("use_reentrant", True))
