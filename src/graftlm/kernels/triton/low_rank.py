"""A low-rank update added to a matrix on CUDA: one read, one write, the product stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 128
"""The tile of the matrix that one program takes."""


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    y,
    s,
    b,
    out,
    factor,
    rows,
    columns,
    rank,
    y_stride,
    out_stride,
    s_stride,
    b_row,
    b_column,
    rows_size: tl.constexpr,
    columns_size: tl.constexpr,
    rank_size: tl.constexpr,
    widen: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows_size + tl.arange(0, rows_size)
    column = tl.program_id(1).to(tl.int64) * columns_size + tl.arange(0, columns_size)
    has_row, has_column = row < rows, column < columns
    product = tl.zeros((rows_size, columns_size), dtype=tl.float32)
    for start in range(0, rank, rank_size):
        inner = start + tl.arange(0, rank_size)
        has_inner = inner < rank
        left = tl.load(
            s + row[:, None] * s_stride + inner[None, :],
            mask=has_row[:, None] & has_inner[None, :],
            other=0.0,
        )
        right = tl.load(
            b + column[None, :] * b_row + inner[:, None] * b_column,
            mask=has_column[None, :] & has_inner[:, None],
            other=0.0,
        ).to(left.dtype)
        if widen:  # the interpreter multiplies no bfloat16
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision="ieee")
    inside = has_row[:, None] & has_column[None, :]
    held = tl.load(y + row[:, None] * y_stride + column[None, :], mask=inside, other=0.0)
    result = held.to(tl.float32) + factor * product
    tl.store(out + row[:, None] * out_stride + column[None, :], result.to(out.dtype.element_ty), mask=inside)


def low_rank_into(out: Tensor, y: Tensor, s: Tensor, b: Tensor, factor: float) -> None:
    """`out = y + factor * s b^T` with one rounding; `out` may be `y`.

    Shapes: out and y [T, N] and s [T, r] with a contiguous last dimension, b [N, r] of any
    strides and any floating dtype (read in the dtype of s).
    """
    rows, columns = out.shape
    rank = s.shape[1]
    if not out.numel():
        return
    size = min(64, max(16, triton.next_power_of_2(rank)))
    _add[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        *(
            y,
            s,
            b,
            out,
            factor,
            rows,
            columns,
            rank,
            y.stride(0),
            out.stride(0),
            s.stride(0),
            b.stride(0),
            b.stride(1),
        ),
        *(ROWS, COLUMNS, size, not out.is_cuda),
        enable_fp_fusion=True,
    )
