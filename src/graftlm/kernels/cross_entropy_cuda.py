"""Cross-entropy through a frozen head on CUDA: cuBLAS makes the logits, Triton their gradient in place."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import cross_entropy
from graftlm.kernels.triton.forms import triton_form

ROWS = 512
"""Rows of logits that exist at a time, at least: fewer would leave a GPU half idle."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """`cross_entropy.linear_cross_entropy`; the logits of a chunk become their gradient where they lie."""
    losses = triton_form("losses_and_gradient_", hidden, weight)
    if losses is None:
        return cross_entropy.linear_cross_entropy(hidden, weight, bias, labels, chunk_rows, need_grad)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad = hidden.new_empty(hidden.shape if need_grad else 0)
    step = max(chunk_rows, ROWS)
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        logits = torch.nn.functional.linear(hidden[rows], weight, bias)
        ignored = labels[rows] < 0  # asked on the device, so that nobody waits
        loss += losses(logits, labels[rows].clamp_min(0), need_grad).masked_fill(ignored, 0).sum()
        if need_grad:
            torch.mm(logits, weight, out=grad[rows]).masked_fill_(ignored.unsqueeze(1), 0)
    return loss, grad
