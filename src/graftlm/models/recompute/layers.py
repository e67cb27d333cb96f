"""Layers that keep their input only and are computed again in backward.

The switch is that of `transformers`, so that caches and masks are treated as there. Not checkpointed are
layers that no gradient passes (below the first adapted one), and the last one: backward begins with it, so
that nothing is gained by forgetting what it computed a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftlm.models.recompute.exchange import exchanged
from graftlm.models.recompute.places import SWITCH

FUNCTION = "_gradient_checkpointing_func"
_NONE = object()

KeepInputs = Callable[[], AbstractContextManager[Any]]
"""A context in which the inputs of a layer are saved."""


class _Checkpoint:
    """What a layer calls instead of itself."""

    def __init__(self, layer: nn.Module, keep_inputs: KeepInputs) -> None:
        self._learns = any(parameter.requires_grad for parameter in layer.parameters())
        self._keep_inputs = keep_inputs

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if not (self._learns or any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)):
            return function(*args)
        with self._keep_inputs():
            return checkpoint(function, *args, use_reentrant=False)


@contextmanager
def recomputed_layers(layers: tuple[nn.Module, ...], keep_inputs: KeepInputs = nullcontext) -> Iterator[None]:
    """Inside, these layers but the last recompute while they are trained; the same gradients to the bit."""
    with ExitStack() as stack:
        for layer in layers[:-1]:
            stack.enter_context(_switched_on(layer, _Checkpoint(layer, keep_inputs)))
            if "forward" in vars(layer):  # a faster one stands in, which knows no switch
                stack.enter_context(exchanged(layer, partial(_checkpointed, layer)))
        yield


@contextmanager
def _switched_on(layer: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    before = {name: vars(layer).get(name, _NONE) for name in (SWITCH, FUNCTION)}
    setattr(layer, FUNCTION, function)
    setattr(layer, SWITCH, True)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _NONE:
                delattr(layer, name)
            else:
                setattr(layer, name, value)


def _checkpointed(layer: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return plain(*args, **kwargs)
        return getattr(layer, FUNCTION)(partial(plain, **kwargs), *args)  # asked for anew: a prefix wraps it

    return forward
