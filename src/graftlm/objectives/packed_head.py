"""Cross-entropy through a frozen output head whose weight is stored in 8 bits: read once, never dense.

The gradient of a hidden state is the mean of the head's rows under the model's own distribution, minus the
row of the label. So it can be gathered in one pass over pieces of the vocabulary, as attention gathers
values: sums are rescaled whenever a larger logit turns up. A piece is read, multiplied twice and forgotten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.quant.packed import PackedWeight

ROWS = 2048
"""Hidden states that pass over the vocabulary together."""
VALUES = 2**23
"""Values of the weight that are dense at a time: 16 MiB of 16 bits."""


def packed_cross_entropy(
    hidden: Tensor, packed: PackedWeight, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Sum of -log p(label), in at least float32; the gradient flows to `hidden`.

    Shapes: hidden [T, H], labels [T], packed [V, H] of a kind with a scale for each row, bias [V].
    """
    loss: Tensor = _PackedCrossEntropy.apply(hidden, packed, labels, bias)  # type: ignore[no-untyped-call]
    return loss


class _PackedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, packed: PackedWeight, labels: Tensor, bias: Tensor | None
    ) -> Tensor:
        parts = [
            _loss_and_gradient(h, packed, t, bias)
            for h, t in zip(hidden.split(ROWS), labels.split(ROWS), strict=True)
        ]
        ctx.save_for_backward(torch.cat([gradient for _, gradient in parts]) if parts else hidden)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        return sum((loss for loss, _ in parts), start=torch.zeros((), dtype=precise, device=hidden.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def _loss_and_gradient(
    hidden: Tensor, packed: PackedWeight, labels: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both for the same rows. The label's own column is kept apart: p - 1 would cancel where p is near 1."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    largest = torch.full_like(labels, -torch.inf, dtype=precise)
    others, of_label = torch.zeros_like(largest), torch.zeros_like(largest)
    gathered = torch.zeros_like(hidden, dtype=precise)
    vocabulary, width = packed.shape
    step = max(1, VALUES // width)
    for start in range(0, vocabulary, step):
        weight = packed.lines(start, start + step).decode(hidden.dtype)
        logits = (hidden @ weight.t()).to(precise)
        if bias is not None:
            logits += bias[start : start + step]
        here = ((labels >= start) & (labels < start + step)).nonzero().flatten()
        column = labels[here] - start
        of_label[here] = logits[here, column]
        now = torch.maximum(largest, logits.amax(dim=1))
        shrink = (largest - now).exp_()
        logits.sub_(now.unsqueeze(1)).exp_()
        logits[here, column] = 0.0
        others.mul_(shrink).add_(logits.sum(dim=1))
        gathered.mul_(shrink.unsqueeze(1)).add_(logits.to(hidden.dtype) @ weight)
        largest = now
    total = others + (of_label - largest).exp_()
    gathered.sub_(packed.rows(labels, precise).mul_(others.unsqueeze(1))).div_(total.unsqueeze(1))
    return (largest + total.log() - of_label).sum(), gathered.to(hidden.dtype)
