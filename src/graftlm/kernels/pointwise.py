"""Elementwise layers in one operator each: root mean square norm and gated SiLU.

Written with separate operations, as model code does, these keep several copies of their input for backward
and read and write memory for every one. Here a piece stays in the cache from the first operation to the
last, and only what cannot be computed again is kept. The forward values are those of the separate
operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels.ops import LIBRARY
from graftlm.kernels.reference import pieces

LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor")
LIBRARY.define("gated_silu(Tensor gate, Tensor up) -> Tensor")
LIBRARY.define("gated_silu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Shapes: x [T, K], weight [K] -> [T, K] and the factor of each row [T, 1], float32."""
    out = torch.empty_like(x)
    scale = x.new_empty(len(x), 1, dtype=torch.float32)
    for rows in pieces(x):
        wide = x[rows].float()
        scale[rows] = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        torch.mul(weight, (wide * scale[rows]).to(x.dtype), out=out[rows])
    return out, scale


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """With n = x scale and g = grad weight: scale (g - n mean(n g)). Shapes: [T, K], scale [T, 1]."""
    out = torch.empty_like(x)
    for rows in pieces(x):
        normed = x[rows] * scale[rows]
        wide = grad[rows].float() * weight
        mean = (normed * wide).mean(-1, keepdim=True)
        out[rows] = wide.addcmul_(normed, mean, value=-1).mul_(scale[rows])
    return out


def _gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes: [T, K] each."""
    out = torch.empty_like(gate)
    for rows in pieces(gate):
        torch.mul(torch.nn.functional.silu(gate[rows]), up[rows], out=out[rows])
    return out


def _gated_silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes: [T, K] each."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    for rows in pieces(gate):
        torch.mul(torch.nn.functional.silu(gate[rows]), grad[rows], out=of_up[rows])
        of_gate[rows] = torch.ops.aten.silu_backward(grad[rows] * up[rows], gate[rows])
    return of_gate, of_up


for _name, _definition in (
    ("rms_norm", _rms_norm),
    ("rms_norm_backward", _rms_norm_backward),
    ("gated_silu", _gated_silu),
    ("gated_silu_backward", _gated_silu_backward),
):
    LIBRARY.impl(_name, _definition, "CompositeExplicitAutograd")


@torch.library.register_fake("graft::rms_norm", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _norm_shape(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)


@torch.library.register_fake("graft::rms_norm_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _norm_backward_shape(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("graft::gated_silu", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _gated_shape(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.register_fake("graft::gated_silu_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _gated_backward_shape(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


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


class _GatedSilu(torch.autograd.Function):
    """Keeps its two inputs, not the SiLU of one."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        width = gate.shape[-1]
        out = torch.ops.graft.gated_silu(gate.reshape(-1, width), up.reshape(-1, width))
        result: Tensor = torch.ops.aten._unsafe_view(out, gate.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (tensor.reshape(-1, tensor.shape[-1]) for tensor in ctx.saved_tensors)
        of_gate, of_up = torch.ops.graft.gated_silu_backward(grads[0].reshape(gate.shape), gate, up)
        return of_gate.view(grads[0].shape), of_up.view(grads[0].shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))`, the mean in float32, the weight **frozen** (arXiv 1910.07467).

    Shapes: x [..., K], weight [K] -> [..., K] in the dtype of x. The gradient flows to `x` only.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    tensor([[0.8485, 1.1314]])
    """
    result: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, the middle of a gated feed-forward part (arXiv 2002.05202). Shapes: [..., K] each.

    >>> gated_silu(torch.zeros(1), torch.ones(1))
    tensor([0.])
    """
    result: Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
    return result
