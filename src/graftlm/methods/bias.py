"""Trained copies of the base's biases, as adapters: the base itself is never edited."""

from __future__ import annotations

from typing import ClassVar, TypeGuard

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.methods.base import Dense, LayerAdapter
from graftlm.quant.linear import QuantisedLinear

ENDS_WITH_BIAS = (nn.Linear, Conv1D, QuantisedLinear, nn.LayerNorm, nn.GroupNorm)
"""Kinds of module whose output is something plus `bias`, so that a trained bias is a shift of the output."""


class BiasModule(nn.Module):
    """For type checkers: a module that passed `has_bias`."""

    bias: nn.Parameter


def has_bias(module: nn.Module) -> TypeGuard[BiasModule]:
    """Whether the module adds a bias at its very end."""
    return isinstance(module, ENDS_WITH_BIAS) and getattr(module, "bias", None) is not None


class BiasShift(LayerAdapter):
    """`y + (bias - base bias)`: the layer with its bias replaced by a trained one. Shape: bias [out]."""

    is_additive: ClassVar[bool] = True
    output_side: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(self, base_bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(base_bias.detach().float().clone())
        self.register_buffer("origin", base_bias.detach().clone(), persistent=False)
        self.origin: Tensor

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change().to(y.dtype)

    def change(self) -> Tensor:
        """What is added to every output."""
        return self.bias - self.origin.to(self.bias.dtype)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {"bias": self.bias.detach().to(dense["bias"].dtype)}
