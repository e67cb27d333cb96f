"""Every operator, declared once: schema, shape function, autograd, public function.

Nothing else in the package calls `torch.ops.graft`. Autograd lives in `autograd.Function`s outside the
operators, so that an accelerated kernel is only ever a forward function registered for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.core.errors import TrainingError
from graftlm.kernels import cross_entropy, cross_entropy_cuda, reference

LIBRARY = torch.library.Library("graft", "DEF")
LIBRARY.define("row_products(Tensor weight, Tensor a, bool need_squares) -> (Tensor, Tensor)")
LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int chunk_rows,"
    " bool need_grad) -> (Tensor, Tensor)"
)
for _name, _definition in (
    ("row_products", reference.row_products),
    ("linear_cross_entropy", cross_entropy.linear_cross_entropy),
):
    LIBRARY.impl(_name, _definition, "CompositeExplicitAutograd")
LIBRARY.impl("linear_cross_entropy", cross_entropy_cuda.linear_cross_entropy, "CUDA")


@torch.library.register_fake("graft::row_products", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _row_products_shape(weight: Tensor, a: Tensor, need_squares: bool) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(weight.dtype, torch.float32)
    squares = weight.new_empty(weight.shape[0] if need_squares else 0, dtype=precise)
    return squares, weight.new_empty(weight.shape[0], a.shape[0], dtype=precise)


@torch.library.register_fake("graft::linear_cross_entropy", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _linear_cross_entropy_shape(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, hidden.new_empty(hidden.shape if need_grad else 0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int
    ) -> Tensor:
        need_grad = ctx.needs_input_grad[0]
        loss: Tensor
        loss, grad = torch.ops.graft.linear_cross_entropy(hidden, weight, bias, labels, chunk_rows, need_grad)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None


def row_products(weight: Tensor, a: Tensor, *, need_squares: bool = True) -> tuple[Tensor, Tensor]:
    """Squared norms of the rows of `weight`, and `weight A^T`; constants for autograd.

    Shapes: weight [N, K] of any layout, a [r, K] -> [N] (empty unless `need_squares`), [N, r], both in
    float32 or better; the product has the rounding of the weight's dtype.
    """
    squares, products = torch.ops.graft.row_products(weight.detach(), a.detach(), need_squares)
    return squares, products


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, chunk_rows: int = 2048
) -> Tensor:
    """Sum over rows of the cross-entropy of a **frozen** linear head, without ever holding all logits.

    Shapes: hidden [T, K], weight [V, K], labels [T] -> scalar, float32. Rows with a negative label count
    nothing, at the price of all others: leave them out where the number of rows may vary. The gradient flows
    to `hidden` only.

    Raises:
        TrainingError: the head is trained; its gradient would be missing.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise TrainingError(
            "The output head requires gradients, which this cross-entropy does not compute.",
            meaning="The head is trained as a whole, for instance by full fine-tuning.",
            fix="Compute logits with the head itself and use torch.nn.functional.cross_entropy.",
        )
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, chunk_rows)  # type: ignore[no-untyped-call]
    return result
