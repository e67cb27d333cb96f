"""Cross-entropy of a chunk of logits on CUDA: loss and gradient, which takes the place of the logits.

One program for each row: a first pass finds the sum of the exponentials, a second one writes the gradient.
A row is a few hundred KB with the vocabularies of today, so the second pass finds it in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 4096
"""Values of a row that are in registers at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _row(  # type: ignore[no-untyped-def]
    logits, labels, losses, stride, vocabulary, need_grad: tl.constexpr, size: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    label = tl.load(labels + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, vocabulary, size):
        column = start + tl.arange(0, size)
        value = tl.load(start_of_row + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(value, axis=0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(value - now), axis=0)
        largest = now
    of_label = tl.load(start_of_row + label).to(tl.float32)
    tl.store(losses + row, tl.log(total) + (largest - of_label))
    if need_grad:
        for start in range(0, vocabulary, size):
            column = start + tl.arange(0, size)
            inside = column < vocabulary
            value = tl.load(start_of_row + column, mask=inside, other=float("-inf")).to(tl.float32)
            share = tl.exp(value - largest) / total
            share = tl.where(column == label, share - 1.0, share)
            tl.store(start_of_row + column, share.to(logits.dtype.element_ty), mask=inside)


def losses_and_gradient_(logits: Tensor, labels: Tensor, need_grad: bool) -> Tensor:
    """-log softmax(logits)[label] of each row, float32 [T]; with `need_grad` the logits become its gradient.

    Shapes: logits [T, V] with a contiguous last dimension, labels [T], each in 0 .. V - 1.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _row[(rows,)](
            logits,
            labels,
            losses,
            logits.stride(0),
            vocabulary,
            need_grad,
            VALUES,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return losses
