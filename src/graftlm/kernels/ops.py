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
from graftlm.kernels import reference

LIBRARY = torch.library.Library("graft", "DEF")
LIBRARY.define(
    "low_rank_add(Tensor y, Tensor x, Tensor a, Tensor b, float scale, float p, Tensor seed)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "low_rank_backward(Tensor grad, Tensor x, Tensor s, Tensor a, Tensor b, float scale, float p, Tensor seed"
    ", bool need_x) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int chunk_rows,"
    " bool need_grad) -> (Tensor, Tensor)"
)
for _name in ("low_rank_add", "low_rank_backward", "linear_cross_entropy"):
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("graft::low_rank_add", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _low_rank_add_shape(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), x.new_empty(x.shape[0], a.shape[0])


@torch.library.register_fake("graft::low_rank_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _low_rank_backward_shape(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), a.new_empty(a.shape), b.new_empty(b.shape)


@torch.library.register_fake("graft::linear_cross_entropy", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _linear_cross_entropy_shape(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, hidden.new_empty(hidden.shape if need_grad else 0)


class _LowRankAdd(torch.autograd.Function):
    """Saves x once in its own dtype (the very tensor: q/k/v share it) and the rank-r product."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float, seed: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, s = torch.ops.graft.low_rank_add(y.reshape(-1, y.shape[-1]), rows, a, b, scale, p, seed)
        ctx.save_for_backward(x, s, a, b, seed)
        ctx.scale, ctx.p = scale, p
        result: Tensor = out.view(y.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, s, a, b, seed = ctx.saved_tensors
        need_x = ctx.needs_input_grad[1]
        dx, da, db = torch.ops.graft.low_rank_backward(
            grad.reshape(-1, grad.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            s,
            a,
            b,
            ctx.scale,
            ctx.p,
            seed,
            need_x,
        )
        return grad, dx.view(x.shape) if need_x else None, da, db, None, None, None


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


def low_rank_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
    """`y + scale * (drop(x) A^T) B^T`, the low-rank update of a linear layer's output (arXiv 2106.09685).

    Shapes: y [..., N], x [..., K] (same leading dimensions and dtype as y), a [r, K], b [N, r] -> [..., N].
    The dropout mask is a function of a seed drawn from torch's CPU generator; nothing but `x`, the rank-r
    product and the seed is kept for backward.

    >>> y, x = torch.zeros(2, 3), torch.ones(2, 4)
    >>> low_rank_add(y, x, torch.ones(1, 4), torch.ones(3, 1), scale=0.5)[0]
    tensor([2., 2., 2.])
    """
    seed = torch.randint(2**62, ()) if dropout > 0.0 else torch.zeros((), dtype=torch.int64)
    result: Tensor = _LowRankAdd.apply(y, x, a, b, scale, dropout, seed)  # type: ignore[no-untyped-call]
    return result


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, chunk_rows: int = 2048
) -> Tensor:
    """Sum over rows of the cross-entropy of a **frozen** linear head, without ever holding all logits.

    Shapes: hidden [T, K], weight [V, K], labels [T] (no ignored rows: leave them out) -> scalar, float32.
    The gradient flows to `hidden` only.

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
