"""Elementwise layers in one operator each: root mean square norm, gated SiLU and GELU, rotary embedding.

Written with separate operations, as model code does, these keep several copies of their input for backward
and read and write memory for every one. Here each value is read once and written once, and only what cannot
be computed again is kept. Arithmetic is float32 inside with one rounding at the end, where models round after
every operation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels import pointwise_cpu, pointwise_reference
from graftlm.kernels.ops import LIBRARY
from graftlm.kernels.sources import remember
from graftlm.kernels.triton.forms import accelerated

LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor")
for _name in ("gated_silu", "gated_gelu"):
    LIBRARY.define(f"{_name}(Tensor gate, Tensor up) -> Tensor")
    LIBRARY.define(f"{_name}_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
LIBRARY.define("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)")

for _name in ("rms_norm", "rms_norm_backward", "gated_silu", "gated_silu_backward", "rope"):
    _definition = getattr(pointwise_reference, _name)
    LIBRARY.impl(_name, _definition, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, getattr(pointwise_cpu, _name), "CPU")
    LIBRARY.impl(_name, accelerated(_name, _definition), "CUDA")
for _name in ("gated_gelu", "gated_gelu_backward"):
    LIBRARY.impl(_name, getattr(pointwise_reference, _name), "CompositeExplicitAutograd")
    LIBRARY.impl(_name, getattr(pointwise_cpu, _name), "CPU")


@torch.library.register_fake("graft::rms_norm", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _norm_shape(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), 1, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("graft::rms_norm_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _norm_backward_shape(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("graft::gated_silu", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("graft::gated_gelu", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _gated_shape(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("graft::gated_silu_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("graft::gated_gelu_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _gated_backward_shape(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@torch.library.register_fake("graft::rope", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _rope_shape(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    of_q, of_k = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))
    return of_q, of_k


class _RmsNorm(torch.autograd.Function):
    """Keeps x, which the model's residual connection holds anyway, and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = torch.ops.graft.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = torch.ops.aten._unsafe_view(out, x.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        dx = torch.ops.graft.rms_norm_backward(grads[0].reshape(flat.shape), flat, weight, scale)
        return dx.view(x.shape), None, None


class _Gated(torch.autograd.Function):
    """Keeps its two inputs, not the function of one."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _gated(gate, up, kind=kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = (tensor.reshape(-1, tensor.shape[-1]) for tensor in ctx.saved_tensors)
        operator = getattr(torch.ops.graft, f"gated_{ctx.kind}_backward")
        of_gate, of_up = operator(grads[0].reshape(gate.shape), gate, up)
        return of_gate.view(grads[0].shape), of_up.view(grads[0].shape), None


class _Rope(torch.autograd.Function):
    """Keeps nothing of q and k."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        of_q, of_k = torch.ops.graft.rope(q, k, cos, sin, False)
        return of_q, of_k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_q, of_k = torch.ops.graft.rope(*grads, *ctx.saved_tensors, True)
        return of_q, of_k, None, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, _ = torch.ops.graft.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
    result: Tensor = torch.ops.aten._unsafe_view(out, x.shape)
    return result


def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    width = gate.shape[-1]
    operator = getattr(torch.ops.graft, f"gated_{kind}")
    out = operator(gate.reshape(-1, width), up.reshape(-1, width))
    result: Tensor = torch.ops.aten._unsafe_view(out, gate.shape)
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))`, the mean in float32, the weight **frozen** (arXiv 1910.07467).

    Shapes: x [..., K], weight [K] (of the dtype of x, or float32) -> [..., K] in the dtype of x. The gradient
    flows to `x` only.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    tensor([[0.8485, 1.1314]])
    """
    result: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return remember(result, partial(_normed, eps=eps), x, weight)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, the middle of a gated feed-forward part (arXiv 2002.05202). Shapes: [..., K] each.

    >>> gated_silu(torch.zeros(1), torch.ones(1))
    tensor([0.])
    """
    result: Tensor = _Gated.apply(gate, up, "silu")  # type: ignore[no-untyped-call]
    return remember(result, partial(_gated, kind="silu"), gate, up)


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu(gate) * up`, with GELU in its form with tanh (arXiv 1606.08415). Shapes: [..., K] each.

    >>> gated_gelu(torch.ones(1), torch.ones(1))
    tensor([0.8412])
    """
    result: Tensor = _Gated.apply(gate, up, "gelu")  # type: ignore[no-untyped-call]
    return remember(result, partial(_gated, kind="gelu"), gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the first R values of every head, in halves (arXiv 2104.09864).

    Shapes: q [B, Hq, T, D], k [B, Hk, T, D], cos, sin [B or 1, T, R], R even and at most D; the other D - R
    values stay. The results are transposed views of contiguous [B, T, H, D]; the gradients too.

    >>> q = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    >>> quarter = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> rope(q, q, *quarter)[0].flatten()
    tensor([-2.,  1.,  3.])
    """
    of_q, of_k = _Rope.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return of_q, of_k
