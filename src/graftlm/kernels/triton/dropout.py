"""Dropout by seed and place on CUDA: `dropout` is the definition, equal to the bit. No mask is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 1024
"""Values of one row that one program takes."""


@triton.jit(do_not_specialize=("seed",))  # type: ignore[untyped-decorator]
def _drop(  # type: ignore[no-untyped-def]
    x, out, seed, threshold, x_stride, out_stride, width, adds: tl.constexpr, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    key = (row + seed).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    pair = (tl.program_id(1) * (size // 2) + tl.arange(0, size // 2)).to(tl.uint32)
    bits = pair * 0x9E3779B1 + low
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D + high
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    numbers = tl.interleave((bits & 0xFFFF).to(tl.int32), (bits >> 16).to(tl.int32))
    column = tl.program_id(1) * size + tl.arange(0, size)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(numbers >= threshold, value, 0.0)
    place = out + row * out_stride + column
    if adds:
        value = value + tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, value.to(out.dtype.element_ty), mask=inside)


def dropped(x: Tensor, threshold: int, seed: Tensor) -> Tensor:
    """`x` with zeros where its 16 random bits are below `threshold`. Shapes: x [T, K], seed [] on the CPU."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, out, threshold, seed, adds=False)
    return out


def add_dropped(out: Tensor, x: Tensor, threshold: int, seed: Tensor) -> None:
    """`out += dropped(x, threshold, seed)`. Shapes: out, x [T, K] with a contiguous last dimension."""
    _launch(x, out, threshold, seed, adds=True)


def _launch(x: Tensor, out: Tensor, threshold: int, seed: Tensor, *, adds: bool) -> None:
    rows, width = x.shape
    if out.numel():
        _drop[(rows, triton.cdiv(width, VALUES))](
            *(x, out, int(seed.item()), threshold, x.stride(0), out.stride(0), width, adds, VALUES),
            enable_fp_fusion=True,
        )
