"""The middle of gated feed-forward parts on CUDA: each value read once, written once, float32 between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 1024
"""Values of one row that one program takes."""


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    gate, up, out, gate_stride, up_stride, width, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * size + tl.arange(0, size)
    inside = column < width
    opened = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    result = opened * tl.sigmoid(opened) * value
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    grad, gate, up, of_gate, of_up, grad_stride, gate_stride, up_stride, width, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * size + tl.arange(0, size)
    inside = column < width
    flow = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    opened = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(opened)
    for_up = flow * opened * share
    for_gate = flow * value * share * (1.0 + opened * (1.0 - share))
    place = row * width + column
    tl.store(of_up + place, for_up.to(of_up.dtype.element_ty), mask=inside)
    tl.store(of_gate + place, for_gate.to(of_gate.dtype.element_ty), mask=inside)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`. Shapes: [T, K] each, with a contiguous last dimension."""
    rows, width = gate.shape
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    if out.numel():
        _forward[(rows, triton.cdiv(width, VALUES))](
            gate, up, out, gate.stride(0), up.stride(0), width, VALUES, enable_fp_fusion=True
        )
    return out


def gated_silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both. Shapes: [T, K] each, with a contiguous last dimension."""
    rows, width = gate.shape
    of_gate, of_up = (torch.empty((rows, width), dtype=t.dtype, device=t.device) for t in (gate, up))
    if of_gate.numel():
        _backward[(rows, triton.cdiv(width, VALUES))](
            *(grad, gate, up, of_gate, of_up, grad.stride(0), gate.stride(0), up.stride(0), width, VALUES),
            enable_fp_fusion=True,
        )
    return of_gate, of_up
