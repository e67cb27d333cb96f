"""Plain torch definitions of the elementwise layers: float32 (float64 for float64) inside, one rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels.reference import pieces


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Shapes: x [T, K], weight [K] -> [T, K] and the factor of each row [T, 1], both as precise as inside."""
    precise = _precise(x)
    out, factor = x.new_empty(x.shape), weight.to(precise)
    scale = x.new_empty(len(x), 1, dtype=precise)
    for rows in pieces(x):
        wide = x[rows].to(precise)
        scale[rows] = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        out[rows] = (wide * scale[rows]).mul_(factor)
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """With n = x scale and g = grad weight: scale (g - n mean(n g)). Shapes: [T, K], scale [T, 1]."""
    out, factor = x.new_empty(x.shape), weight.to(scale.dtype)
    for rows in pieces(x):
        normed = x[rows] * scale[rows]
        wide = grad[rows] * factor
        mean = (normed * wide).mean(-1, keepdim=True)
        out[rows] = wide.addcmul_(normed, mean, value=-1).mul_(scale[rows])
    return out


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes: [T, K] each."""
    return _gated(F.silu, gate, up)


def gated_silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes: [T, K] each."""
    return _gated_backward(F.silu, torch.ops.aten.silu_backward, grad, gate, up)


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """Shapes: [T, K] each."""
    return _gated(_gelu, gate, up)


def gated_gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes: [T, K] each."""
    return _gated_backward(_gelu, _gelu_backward, grad, gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The first R values of each head, in halves: `x cos + (-second half, first half) sin`.

    Shapes: q [B, Hq, T, D], k [B, Hk, T, D], cos, sin [B or 1, T, R], R even and at most D. The results lie
    token by token, as linear layers give theirs. `inverse`: the transposed map, which is the gradient.
    """
    precise = _precise(q)
    cos, sin = cos.to(precise).unsqueeze(1), sin.to(precise).unsqueeze(1)
    if inverse:
        sin = -sin.roll(sin.shape[-1] // 2, -1)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _gated(function: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    out, precise = gate.new_empty(gate.shape), _precise(gate)
    for rows in pieces(gate):
        out[rows] = function(gate[rows].to(precise)).mul_(up[rows])
    return out


def _gated_backward(
    function: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor, Tensor], Tensor],
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
) -> tuple[Tensor, Tensor]:
    of_gate, of_up, precise = gate.new_empty(gate.shape), up.new_empty(up.shape), _precise(gate)
    for rows in pieces(gate):
        flow, wide = grad[rows].to(precise), gate[rows].to(precise)
        of_up[rows] = function(wide).mul_(flow)
        of_gate[rows] = backward(flow * up[rows], wide)
    return of_gate, of_up


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    return result


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    out = x.new_empty(batch, tokens, heads, width).transpose(1, 2)
    turning = cos.shape[-1]
    wide = x[..., :turning].to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    out[..., :turning] = (wide * cos).add_(torch.cat((-second, first), dim=-1).mul_(sin))
    out[..., turning:] = x[..., turning:]
    return out


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
