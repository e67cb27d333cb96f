"""A linear layer whose weight is stored in few bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.kernels.fp8_products import FP8_PRODUCTS
from graftlm.kernels.quantised import quantised_linear
from graftlm.quant.module import PackedModule
from graftlm.quant.packed import PackedWeight


class QuantisedLinear(PackedModule):
    """`y = x W^T + b` with a packed, frozen W [out, in]."""

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(packed, dtype)
        self.out_features, self.in_features = packed.shape
        self.bias = bias
        self.multiplies_in_fp8 = False
        """Whether products are formed in 8 bits too, for a weight in `fp8` and for the time of a training."""

    @property
    def kind(self) -> str:
        """What operators take as the kind of the weight: of its scheme, or `FP8_PRODUCTS`."""
        return FP8_PRODUCTS if self.multiplies_in_fp8 else self.scheme.kind

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None:
            return F.linear(x, self.dense, self.bias)
        packed = self.packed
        block = packed.scheme.block_size
        return quantised_linear(x, packed.stored, self.kind, block, *packed.shape, self.bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, {self.scheme.kind}"
