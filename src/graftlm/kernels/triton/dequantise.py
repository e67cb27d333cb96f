"""Reading packed weights on CUDA: one kernel that undoes both quantisations and writes 16 bits.

4-bit weights are read once and written once (2.5 bytes a value in 16 bits); quantised scales are never stored
in float32. `decoding` is the definition, equal to the bit: a product and a sum are rounded each, so no fused
multiply-add may replace them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from graftlm.kernels.codebooks import CODEBOOKS, codebook, dynamic_map
from graftlm.kernels.decoding import SCALE_BLOCK, TILE, unit_of

BYTES = 1024
"""Bytes of codes that one program reads."""


@triton.jit  # type: ignore[untyped-decorator]
def _read_blocks(  # type: ignore[no-untyped-def]
    codes,
    scales,
    scale_scales,
    scale_offset,
    scale_map,
    values,
    out,
    count,
    block: tl.constexpr,
    scale_block: tl.constexpr,
    nested: tl.constexpr,
    size: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = 2 * byte < count
    pair = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    index = 2 * byte // block  # blocks are even: both of a pair lie in one
    scale = tl.load(scales + index, mask=inside, other=0)
    if nested:
        plain = tl.load(scale_map + scale.to(tl.int32))
        plain = plain * tl.load(scale_scales + index // scale_block, mask=inside, other=0.0)
        scale = plain + tl.load(scale_offset)
    first = tl.load(values + (pair >> 4)) * scale
    second = tl.load(values + (pair & 15)) * scale
    place = tl.program_id(0).to(tl.int64) * size * 2 + tl.arange(0, size * 2)
    both = tl.interleave(first, second).to(out.dtype.element_ty)
    tl.store(out + place, both, mask=place < count)


@triton.jit  # type: ignore[untyped-decorator]
def _read_rows(  # type: ignore[no-untyped-def]
    codes, scales, values, unit, out, count, columns, tile: tl.constexpr, size: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < count
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    index = place // columns
    if tile:
        index = index // tile * tl.cdiv(columns, tile) + place % columns // tile
    scale = tl.load(scales + index, mask=inside, other=0.0)
    product = tl.load(values + code) * scale * unit
    tl.store(out + place, product.to(out.dtype.element_ty), mask=inside)


def read_into(out: Tensor, stored: Sequence[Tensor], kind: str, block: int) -> None:
    """The dense weight into the contiguous `out` [rows, columns], rounded once to its dtype."""
    codes, values, count = stored[0].view(torch.uint8), _values(kind, out.device), out.numel()
    with torch.cuda.device_of(out):  # a layer may lie on another device than the current one
        if kind in CODEBOOKS:
            is_nested = len(stored) == 4
            scale_scales, offset = stored[2:] if is_nested else (values, values)
            _read_blocks[(triton.cdiv(count, 2 * BYTES),)](
                *(codes, stored[1], scale_scales, offset, dynamic_map(out.device), values, out, count),
                *(block, SCALE_BLOCK, is_nested, BYTES),
                enable_fp_fusion=False,
            )
        else:
            tile = TILE if kind == "fp8_block" else 0
            _read_rows[(triton.cdiv(count, BYTES),)](
                *(codes, stored[1], values, unit_of(kind), out, count, out.shape[1], tile, BYTES),
                enable_fp_fusion=False,
            )


@cache
def _values(kind: str, device: torch.device) -> Tensor:
    """What the codes stand for, float32: [16], or [256] by the byte."""
    if kind in CODEBOOKS:
        return codebook(kind, device)
    every = torch.arange(256, dtype=torch.uint8, device=device)
    return every.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn).float()
