"""Rows with a negative label count nothing in the cross-entropy of a frozen head."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from graftlm.kernels.ops import linear_cross_entropy


def test_loss_and_gradient_are_those_of_the_other_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 8, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 19, (37,), generator=draw)
    labels[::3] = -100
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=5)
    (found,) = torch.autograd.grad(loss, hidden)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum", ignore_index=-100)
    (gradient,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradient)
    assert not found[::3].any()
