"""Causal attention within documents that lie one after another: schema, autograd, public function.

No batch dimension and no padding: a batch is its tokens in a row and where each document starts. Scores are
never kept: backward computes them again from queries, keys and one number for each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.core.errors import TrainingError
from graftlm.kernels import attention_cpu, attention_reference
from graftlm.kernels.ops import LIBRARY

_REST = "Tensor starts, Tensor? parents, float scale, int? window"
LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REST})"
    " -> (Tensor, Tensor, Tensor)"
)
for _name in ("attention", "attention_backward"):
    LIBRARY.impl(_name, getattr(attention_reference, _name), "CompositeExplicitAutograd")
    LIBRARY.impl(_name, getattr(attention_cpu, _name), "CPU")


@torch.library.register_fake("graft::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _attention_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    parents: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=precise)


@torch.library.register_fake("graft::attention_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _backward_shape(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    parents: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """Keeps its inputs and its output, which the next layer keeps anyway, and one number for each row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        parents: Tensor | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        out: Tensor
        out, lse = torch.ops.graft.attention(q, k, v, starts, parents, scale, window)
        ctx.save_for_backward(q, k, v, out, lse, starts, parents)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.graft.attention_backward(grads[0], *ctx.saved_tensors, ctx.scale, ctx.window)
        return *gradients, None, None, None, None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def attention_is_native(dtype: torch.dtype, head_dim: int) -> str | None:
    """None where the fast kernel of this machine takes such tensors, else the reason why it does not."""
    return attention_cpu.attention_is_native(dtype, head_dim)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
    parents: Tensor | None = None,
) -> Tensor:
    """`softmax(scale q k^T) v` for each head, each token seeing what comes before it in its own document.

    A document that continues another, as one of several answers continues a prompt, sees that one first.

    Shapes: q [T, Hq, D], k and v [P + T, Hkv, D] of any strides with a contiguous last dimension (Hq a
    multiple of Hkv: that many query heads share a head of keys) -> [T, Hq, D], contiguous. Inside autocast
    in the dtype that it asks for.

    Args:
        starts: int64 [n + 1] on the CPU, where each document begins and the last one ends: 0, ..., T.
        scale: what scores are multiplied with, 1 / sqrt(D) as a rule.
        window: how many tokens a token sees at most, itself included. The first P keys, which stand before
            every document, are always seen and not counted.
        parents: int64 [n] on the CPU, the number of the document that each one continues, -1 for none. A
            parent stands in front and has no parent itself.

    Raises:
        TrainingError: shapes, starts or parents that do not fit together.

    >>> x = torch.ones(3, 1, 2)
    >>> values = torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1).expand(3, 1, 2)
    >>> attention(x, x, values, torch.tensor([0, 2, 3]), scale=1.0)[:, 0, 0]
    tensor([1., 2., 8.])
    >>> parents = torch.tensor([-1, 0])  # the last token continues the first two
    >>> attention(x, x, values, torch.tensor([0, 2, 3]), scale=1.0, parents=parents)[2, 0, 0]
    tensor(4.0000)
    """
    _check(q, k, v, starts, parents, window)
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        out: Tensor = torch.ops.graft.attention(q, k, v, starts, parents, scale, window)[0]
        return out
    result: Tensor = _Attention.apply(q, k, v, starts, parents, scale, window)  # type: ignore[no-untyped-call]
    return result


def _check(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, parents: Tensor | None, window: int | None
) -> None:
    """Everything that a kernel takes for granted."""
    if not (
        q.dim() == k.dim() == 3
        and k.shape == v.shape
        and k.shape[0] >= q.shape[0]
        and k.shape[2] == q.shape[2]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
        and all(
            (each.dim(), each.dtype, each.device.type) == (1, torch.int64, "cpu")
            for each in (starts, parents)
            if each is not None
        )
        and (window is None or window > 0)
    ):
        raise TrainingError(
            f"Attention over q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
            f"starts {tuple(starts.shape)} in {starts.dtype} on {starts.device}, window {window}.",
            meaning="Shapes or types do not fit together.",
            fix="q [T, Hq, D]; k, v [P + T, Hkv, D], Hq a multiple of Hkv; starts int64, CPU; window > 0.",
        )
