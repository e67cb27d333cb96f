"""The elementwise layers on a CPU: compiled code for float32 and bfloat16, else the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import pointwise_reference as reference
from graftlm.kernels.native import pointwise_call as native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`pointwise_reference.rms_norm`."""
    if not native.is_native(x, weight):
        return reference.rms_norm(x, weight, eps)
    out, scale = x.new_empty(x.shape), x.new_empty(len(x), 1, dtype=torch.float32)
    native.rms_norm(_in_rows(x), weight.contiguous(), eps, out, scale)
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`pointwise_reference.rms_norm_backward`."""
    if not (native.is_native(x, weight) and grad.dtype == x.dtype):
        return reference.rms_norm_backward(grad, x, weight, scale)
    out = x.new_empty(x.shape)
    native.rms_norm_backward(_in_rows(grad), _in_rows(x), weight.contiguous(), scale.contiguous(), out)
    return out


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`pointwise_reference.gated_silu`."""
    return _gated("silu", gate, up) if _fits(gate, up) else reference.gated_silu(gate, up)


def gated_silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`pointwise_reference.gated_silu_backward`."""
    if not _fits(grad, gate, up):
        return reference.gated_silu_backward(grad, gate, up)
    return _gated_backward("silu", grad, gate, up)


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`pointwise_reference.gated_gelu`."""
    return _gated("gelu", gate, up) if _fits(gate, up) else reference.gated_gelu(gate, up)


def gated_gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`pointwise_reference.gated_gelu_backward`."""
    if not _fits(grad, gate, up):
        return reference.gated_gelu_backward(grad, gate, up)
    return _gated_backward("gelu", grad, gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`pointwise_reference.rope`."""
    same = q.dtype == k.dtype and cos.dtype == sin.dtype and cos.shape[-1] <= native.LARGEST_HEAD
    if not (same and native.is_native(q, cos)):
        return reference.rope(q, k, cos, sin, inverse)
    of_q, of_k = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))
    native.rope(_in_rows(q), _in_rows(k), cos.contiguous(), sin.contiguous(), inverse, of_q, of_k)
    return of_q, of_k


def _fits(*tensors: Tensor) -> bool:
    return native.is_native(*tensors) and len({tensor.dtype for tensor in tensors}) == 1


def _gated(kind: native.Gate, gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    native.gated(kind, _in_rows(gate), _in_rows(up), out)
    return out


def _gated_backward(kind: native.Gate, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    native.gated_backward(kind, _in_rows(grad), _in_rows(gate), _in_rows(up), of_gate, of_up)
    return of_gate, of_up


def _in_rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, copied if need be."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
