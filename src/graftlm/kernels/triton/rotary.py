"""Rotary embedding of queries and keys on CUDA: one read, one write, float32 between (arXiv 2104.09864)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 4096
"""Values of one token that one program takes at most, heads together."""


@triton.jit  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    out,
    tokens,
    heads,
    width,
    turning,
    x_batch,
    x_head,
    x_token,
    cos_batch,
    cos_token,
    inverse: tl.constexpr,
    heads_size: tl.constexpr,
    width_size: tl.constexpr,
):
    batch, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1) * heads_size + tl.arange(0, heads_size)
    column = tl.arange(0, width_size)
    half = turning // 2
    is_first = column < half
    other = tl.where(is_first, column + half, column - half)
    has_column, turns = column < width, column < turning
    angles = batch * cos_batch + token * cos_token
    along = tl.load(cos + angles + column, mask=turns, other=1.0).to(tl.float32)
    if inverse:  # the sine belongs to where the value came from
        across = tl.load(sin + angles + other, mask=turns, other=0.0).to(tl.float32)
        across = tl.where(is_first, across, -across)
    else:
        across = tl.load(sin + angles + column, mask=turns, other=0.0).to(tl.float32)
        across = tl.where(is_first, -across, across)
    row = x + batch * x_batch + head[:, None].to(tl.int64) * x_head + token * x_token
    has_head = head[:, None] < heads
    value = tl.load(row + column[None, :], mask=has_head & has_column[None, :], other=0.0).to(tl.float32)
    turned = tl.load(row + other[None, :], mask=has_head & turns[None, :], other=0.0).to(tl.float32)
    result = value * along[None, :] + turned * across[None, :]
    place = out + ((batch * tokens + token) * heads + head[:, None]) * width + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=has_head & has_column[None, :])


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`pointwise_reference.rope`. Shapes: q [B, Hq, T, D], k [B, Hk, T, D], cos, sin [B or 1, T, R].

    The last dimension is contiguous; cos and sin have the same strides.
    """
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    return _turned(q, cos, sin, inverse), _turned(k, cos, sin, inverse)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    batch, heads, tokens, width = x.shape
    out = torch.empty((batch, tokens, heads, width), dtype=x.dtype, device=x.device)
    if out.numel():
        width_size = triton.next_power_of_2(width)
        heads_size = min(triton.next_power_of_2(heads), max(1, VALUES // width_size))
        cos_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
        _turn[(batch * tokens, triton.cdiv(heads, heads_size))](
            *(x, cos, sin, out, tokens, heads, width, cos.shape[-1]),
            *(x.stride(0), x.stride(1), x.stride(2), cos_batch, cos.stride(1)),
            *(inverse, heads_size, width_size),
            enable_fp_fusion=True,
        )
    return out.transpose(1, 2)
