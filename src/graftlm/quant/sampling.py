"""Single numbers of a packed weight, without decoding all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels.codebooks import codebook
from graftlm.kernels.decoding import TILE, plain_scales, unit_of
from graftlm.quant.packed import PackedWeight


def values_at(packed: PackedWeight, index: Tensor) -> Tensor:
    """The numbers at these positions of the flattened weight, without decoding it. Shapes: [n] -> [n]."""
    codes, kind = packed.tensors["codes"].flatten(), packed.scheme.kind
    index, scales = index.to(codes.device), plain_scales(packed.stored)
    if not packed.scheme.is_four_bit:
        row, column = index // packed.shape[1], index % packed.shape[1]
        scale = scales[row] if packed.scheme.has_row_scales else scales[row // TILE, column // TILE]
        return codes[index].float() * scale * unit_of(kind)
    pairs = codes[index // 2]
    values = codebook(kind, codes.device)[torch.where(index % 2 == 0, pairs >> 4, pairs & 0xF).int()]
    return values * scales[index // packed.scheme.block_size]
