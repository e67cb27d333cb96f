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
    "dora_add(Tensor y, Tensor x, Tensor a, Tensor b, Tensor gain, Tensor? bias, float scale, float p"
    ", Tensor seed) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "dora_backward(Tensor grad, Tensor out, Tensor gain, Tensor? bias, bool need_y, bool need_gain)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define("row_products(Tensor weight, Tensor a, bool need_squares) -> (Tensor, Tensor)")
LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int chunk_rows,"
    " bool need_grad) -> (Tensor, Tensor)"
)
for _name in (
    *("low_rank_add", "low_rank_backward", "dora_add", "dora_backward", "row_products"),
    "linear_cross_entropy",
):
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


@torch.library.register_fake("graft::dora_add", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _dora_add_shape(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), x.new_empty(x.shape[0], a.shape[0])


@torch.library.register_fake("graft::dora_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _dora_backward_shape(
    grad: Tensor, out: Tensor, gain: Tensor, bias: Tensor | None, need_y: bool, need_gain: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape if need_y else 0), gain.new_empty(gain.shape if need_gain else 0)


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
        result: Tensor = torch.ops.aten._unsafe_view(out, y.shape)  # a view could not be changed in place
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


class _DoraAdd(torch.autograd.Function):
    """Saves what `_LowRankAdd` saves, and its own output, which most models keep for their next operation."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        gain: Tensor,
        bias: Tensor | None,
        scale: float,
        p: float,
        seed: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, s = torch.ops.graft.dora_add(y.reshape(-1, y.shape[-1]), rows, a, b, gain, bias, scale, p, seed)
        result: Tensor = torch.ops.aten._unsafe_view(out, y.shape)  # a view could not be changed in place
        kept = result if ctx.needs_input_grad[4] else result.new_empty(0, result.shape[-1])
        ctx.save_for_backward(x, s, a, b, gain, bias, seed, kept)
        ctx.scale, ctx.p = scale, p
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, a, b, gain, bias, seed, out = ctx.saved_tensors
        need_y, need_x, _, _, need_gain = ctx.needs_input_grad[:5]
        grad = grads[0].reshape(-1, gain.shape[0])
        dy, dgain = torch.ops.graft.dora_backward(
            grad, out.reshape(-1, gain.shape[0]), gain, bias, need_y, need_gain
        )
        spread = gain.unsqueeze(1)
        rows, scaled = x.reshape(-1, x.shape[-1]), b * spread
        dx, da, db = torch.ops.graft.low_rank_backward(
            grad, rows, s, a, scaled, ctx.scale, ctx.p, seed, need_x
        )
        dy = dy.view(grads[0].shape) if need_y else None
        dx = dx.view(x.shape) if need_x else None
        return dy, dx, da, (db * spread).to(b.dtype), dgain if need_gain else None, None, None, None, None


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


def dora_add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """`gain * (y - bias + scale * (drop(x) A^T) B^T) + bias`, DoRA around a layer (arXiv 2402.09353).

    Shapes: y [..., N] with the bias in it, x [..., K] (same leading dimensions and dtype as y), a [r, K],
    b [N, r], gain [N] (float32 or better), bias [N] or None -> [..., N]. Gradients flow to all but `bias`.
    Kept for backward are `x`, the rank-r product, and the output itself: it must not be changed in place.

    >>> y, x, bias = torch.full((1, 2), 3.0), torch.ones(1, 4), torch.ones(2)
    >>> dora_add(y, x, torch.ones(1, 4), torch.ones(2, 1), torch.tensor([1.0, 0.5]), bias, scale=0.5)
    tensor([[5., 3.]])
    """
    seed = torch.randint(2**62, ()) if dropout > 0.0 else torch.zeros((), dtype=torch.int64)
    result: Tensor = _DoraAdd.apply(y, x, a, b, gain, bias, scale, dropout, seed)  # type: ignore[no-untyped-call]
    return result


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
