"""Tensors kept for a backward pass that autograd itself does not know how to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Kept:
    """Saved as any operation saves its inputs, so that hooks on saved tensors around this place see them."""

    def __init__(self, *tensors: Tensor) -> None:
        anchor = torch.empty(0, requires_grad=True)
        self._node: Any = _Keep.apply(anchor, *tensors).grad_fn  # type: ignore[no-untyped-call]

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, outside of any graph."""
        saved: tuple[Tensor, ...] = self._node.saved_tensors
        return tuple(tensor.detach() for tensor in saved)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("nothing is computed from this")
