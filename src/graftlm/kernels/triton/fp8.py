"""Rows rounded to FP8 on CUDA, with a scale for each: one program for each row, which stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max


@triton.jit  # type: ignore[untyped-decorator]
def _round_row(  # type: ignore[no-untyped-def]
    x, factors, codes, scales, stride, width, top, has_factors: tl.constexpr, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, size)
    inside = column < width
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if has_factors:
        value = value * tl.load(factors + column, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-30) / top
    scaled = tl.minimum(tl.maximum(value / scale, -top), top)
    tl.store(codes + row * width + column, scaled.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def rows_in_fp8(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [T, K] of `x * factors` and the scale of each row, float32 [T].

    Shapes: x [T, K] with a contiguous last dimension, factors [K] in float32 or None for ones.
    """
    rows, width = x.shape
    codes = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        size = triton.next_power_of_2(width)
        has_factors = factors is not None
        _round_row[(rows,)](
            *(x, factors if has_factors else scales, codes, scales, x.stride(0), width, LARGEST),
            *(has_factors, size),
            num_warps=min(16, max(1, size // 256)),
            enable_fp_fusion=True,
        )
    return codes, scales
