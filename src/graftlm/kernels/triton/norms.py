"""RMS norm on CUDA: one program for each row, which is read once and stays in registers.

Arithmetic in float32 with one rounding at the end. The weight may be wider than the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_WIDTH = 2**16
"""Values of a row that registers hold."""


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x, weight, out, scales, x_stride, width, eps, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, size)
    inside = column < width
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / width + eps)
    normed = wide * scale
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (normed * factor).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    grad, x, weight, scales, out, grad_stride, x_stride, width, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, size)
    inside = column < width
    scale = tl.load(scales + row)
    normed = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) * scale
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32) * factor
    mean = tl.sum(normed * wide, axis=0) / width
    result = (wide - normed * mean) * scale
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Shapes: x [T, K] with a contiguous last dimension, weight [K] -> [T, K], scales [T, 1] in float32."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        size = triton.next_power_of_2(width)
        _forward[(rows,)](
            *(x, weight.contiguous(), out, scales, x.stride(0), width, eps, size),
            num_warps=_warps(size),
            enable_fp_fusion=True,
        )
    return out, scales


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Shapes: grad, x [T, K] with a contiguous last dimension, weight [K], scales [T, 1] -> [T, K]."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        size = triton.next_power_of_2(width)
        _backward[(rows,)](
            *(grad, x, weight.contiguous(), scales, out, grad.stride(0), x.stride(0), width, size),
            num_warps=_warps(size),
            enable_fp_fusion=True,
        )
    return out


def _warps(size: int) -> int:
    """Threads so that each holds eight values of a row, within what a program may have."""
    return min(16, max(1, size // 256))
