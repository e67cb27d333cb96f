"""Linear layers of which nothing is trained, as the fused products of `kernels.adapted` take them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graftlm.kernels.quantised  # noqa: F401  (declares the products of packed weights)
from graftlm.kernels.adapted import Frozen
from graftlm.kernels.adapted_products import Packing
from graftlm.quant.linear import QuantisedLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

PLAIN: set[type] = {Tensor, nn.Parameter}
"""Types of tensors that are nothing but their values. A rehearsal without values adds its own."""


def frozen(layer: object, x: Tensor) -> Frozen | None:
    """The layer, if `layer(x)` is nothing but its own product in the dtype of x.

    Not so are: other kinds of layer and subclasses, layers with hooks or an exchanged forward, trained
    weights, weights of a special tensor type, and autocast to another dtype than that of x.
    """
    if type(layer) not in (nn.Linear, Conv1D, QuantisedLinear) or not _computes_in(x.dtype, x.device.type):
        return None
    assert isinstance(layer, nn.Linear | Conv1D | QuantisedLinear)
    if "forward" in vars(layer) or any(getattr(layer, name) for name in _HOOKS):
        return None
    bias = layer.bias
    if isinstance(layer, QuantisedLinear) and layer.dense is None:
        packed, kind = layer.packed, layer.kind
        packing = Packing(kind, packed.scheme.block_size, *packed.shape)
        return Frozen(tuple(packed.stored), bias, packing) if _is_plain(bias) else None
    weight = layer.weight
    if weight.dtype != x.dtype or not (_is_plain(weight) and _is_plain(bias)):
        return None
    return Frozen((weight.t() if isinstance(layer, Conv1D) else weight,), bias)


def _computes_in(dtype: torch.dtype, device: str) -> bool:
    """Whether a product of tensors of this dtype is computed and given in it."""
    if not dtype.is_floating_point:
        return False
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return True
    return torch.get_autocast_dtype(device) == dtype


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether nothing but its values counts: not trained, no tensor type of its own."""
    if tensor is None:
        return True
    return type(tensor) in PLAIN and not (tensor.requires_grad and torch.is_grad_enabled())
