"""Keys and values of real tokens, as a prefix to begin with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from graftlm.core.errors import TargetError
from graftlm.methods.place import Place
from graftlm.methods.virtual.stacks import KeyValues
from graftlm.quant.facts import device_of


@torch.no_grad()
def real_states(stack: nn.Module, ids: Tensor, shape: KeyValues) -> Tensor:
    """What the base caches for these tokens, [layers, 2, heads, n, head size] in float32.

    Raises:
        TargetError: the stack keeps no cache.
    """
    device = device_of(stack)
    if device.type == "meta":  # only counted, not made
        return torch.empty(shape.layers, 2, shape.heads, len(ids), shape.head_dim)
    cache = DynamicCache()
    with _as_base(stack):
        stack(input_ids=ids.unsqueeze(0).to(device), past_key_values=cache)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    if len(layers) != shape.layers or any(keys is None for keys, _ in layers):
        raise TargetError(
            f"{type(stack).__name__} does not tell the keys and values of a text.",
            fix="Begin with random numbers: init_weights=None.",
        )
    return torch.stack([torch.stack((keys[0], values[0])) for keys, values in layers]).float()


@contextmanager
def _as_base(stack: nn.Module) -> Iterator[None]:
    """No adapter and no dropout for the length of the block."""
    shown = [(module, module.shown) for module in stack.modules() if isinstance(module, Place)]
    training = [module for module in stack.modules() if module.training]
    stack.eval()
    for place, _ in shown:
        place.shown = ()
    try:
        yield
    finally:
        for place, names in shown:
            place.shown = names
        for module in training:
            module.training = True
