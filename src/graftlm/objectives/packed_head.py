"""Cross-entropy through a frozen output head whose weight is stored in 8 bits: read once, never dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels.cross_entropy import LOGITS, FrozenHead, head_cross_entropy
from graftlm.kernels.log_probs import RowLogProbs, head_log_probs, with_gradient
from graftlm.quant.packed import PackedWeight

VALUES = 2**23
"""Values of the weight that are dense at a time, at most: 16 MiB of 16 bits."""


def packed_cross_entropy(
    hidden: Tensor, packed: PackedWeight, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Sum of -log p(label), in at least float32; the gradient flows to `hidden`.

    Shapes: hidden [T, H], labels [T], packed [V, H] of a kind with a scale for each row, bias [V].
    """
    loss: Tensor = _PackedCrossEntropy.apply(hidden, packed, labels, bias)  # type: ignore[no-untyped-call]
    return loss


def packed_log_probs(
    hidden: Tensor,
    packed: PackedWeight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `kernels.log_probs.linear_log_probs`, for a weight in 8 bits."""

    def compute(x: Tensor, need_grad: bool) -> RowLogProbs:
        head = _decoded(packed, x.dtype)
        return head_log_probs(
            x, head, bias, labels, scale=scale, need_grad=need_grad, need_entropy=with_entropy
        )

    return with_gradient(hidden, compute)


def _decoded(packed: PackedWeight, dtype: torch.dtype) -> FrozenHead:
    """A piece of it at a time."""
    return FrozenHead(
        packed.shape,
        lambda start, stop: packed.lines(start, stop).decode(dtype),
        lambda index: packed.rows(index, torch.promote_types(dtype, torch.float32)),
        most_lines=VALUES // packed.shape[1],
    )


class _PackedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, packed: PackedWeight, labels: Tensor, bias: Tensor | None
    ) -> Tensor:
        head = _decoded(packed, hidden.dtype)
        loss, gradient = head_cross_entropy(hidden, head, bias, labels, LOGITS, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None
