"""Plain torch definitions of how packed weights are read: the oracle, and what runs where nothing faster is.

A stored weight is a list of tensors in the order of `PARTS`. All arithmetic is float32 and rounded once, at
the end, as bitsandbytes does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels.codebooks import CODEBOOKS, codebook, dynamic_map

PARTS = ("codes", "scales", "scale_scales", "scale_offset")
"""What a stored weight consists of; the last two only where the scales are quantised themselves."""

SCALE_BLOCK = 256
"""How many quantised scales share one scale of their own."""

TILE = 128
"""Rows and columns that share a scale in `fp8_block`."""


def decode(
    stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight [rows, columns] in `dtype`."""
    codes, scales = stored[0], plain_scales(stored)
    if kind in CODEBOOKS:
        return _decode_blocks(codes, scales, kind, block, rows * columns).view(rows, columns).to(dtype)
    if kind == "fp8_block":
        return _decode_tiles(codes, scales, dtype)
    return (codes.float() * scales.unsqueeze(1) * unit_of(kind)).to(dtype)


def unit_of(kind: str) -> float:
    """What code times scale is multiplied with at last: 1/127 for int8, the float32 that bitsandbytes has."""
    return 7.874015718698502e-3 if kind == "int8" else 1.0


def plain_scales(stored: Sequence[Tensor]) -> Tensor:
    """The scales in float32, read through their own quantisation where they have one."""
    scales = stored[1]
    if len(stored) == 2:
        return scales
    values = dynamic_map(scales.device)[scales.int()]
    return by_blocks(values, stored[2], SCALE_BLOCK) + stored[3]


def by_blocks(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """`values` [n], each block of them multiplied with its scale; the last block may be short."""
    missing = -len(values) % block
    blocks = F.pad(values, (0, missing)).view(-1, block)
    return (blocks * scales.unsqueeze(1)).flatten()[: len(values)]


def _decode_tiles(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for place, row in enumerate(scales):
        lines = slice(place * TILE, (place + 1) * TILE)
        out[lines] = codes[lines].float() * row.repeat_interleave(TILE)[: codes.shape[1]]
    return out


def _decode_blocks(codes: Tensor, scales: Tensor, kind: str, block: int, count: int) -> Tensor:
    both = torch.stack([codes >> 4, codes & 0xF], dim=-1).flatten()[:count]
    return by_blocks(codebook(kind, codes.device)[both.int()], scales, block)


def quantised_linear(
    x: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    block: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
) -> Tensor:
    """`x W^T + bias`. Shapes: x [T, columns], bias [rows] -> [T, rows], in the dtype of x."""
    weight = decode(stored, kind, block, rows, columns, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def quantised_linear_backward(
    grad: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int
) -> Tensor:
    """The gradient of the input, `grad W`. Shapes: grad [T, rows] -> [T, columns]."""
    return grad @ decode(stored, kind, block, rows, columns, grad.dtype)
