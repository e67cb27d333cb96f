"""A trained gain on every column of a matrix: what DoRA and (IA)^3 end with.

y = x + (gain - 1) (x - bias)        that is gain (x - bias) + bias; computed in float32, rounded once

In bfloat16 the numbers next to 1 are 1/128 apart, more than most gains ever move: they stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels import gain_cpu
from graftlm.kernels.ops import LIBRARY
from graftlm.kernels.reference import pieces

LIBRARY.define("with_gain(Tensor x, Tensor gain, Tensor? bias) -> Tensor")
LIBRARY.define("apply_gain(Tensor(a!) y, Tensor gain, Tensor? bias) -> ()")
LIBRARY.define("with_gain_on_rows(Tensor x, Tensor gain) -> Tensor")
LIBRARY.define(
    "gain_backward(Tensor grad, Tensor x, Tensor gain, bool need_x, bool need_gain) -> (Tensor, Tensor)"
)


def _into(out: Tensor, x: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """Shapes: out, x [T, N] (they may be the same), gain, bias [N]."""
    precise = torch.promote_types(x.dtype, gain.dtype)
    change = (gain - 1).to(precise)
    for rows in pieces(x):
        wide = x[rows].to(precise)
        from_bias = wide if bias is None else wide - bias.to(precise)
        out[rows] = wide + change * from_bias


def _with_gain(x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _into(out, x, gain, bias)
    return out


def _apply_gain(y: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    _into(y, y, gain, bias)


def _with_gain_on_rows(x: Tensor, gain: Tensor) -> Tensor:
    """`gain_n x_n` for each row, laid out as x. Shapes: x [N, K] of any layout, gain [N] -> [N, K]."""
    out = torch.empty_like(x)
    is_transposed = x.stride(0) < x.stride(1)
    stored, to, factor = (x.t(), out.t(), gain) if is_transposed else (x, out, gain.unsqueeze(1))
    for rows in pieces(stored):
        to[rows] = stored[rows].to(gain.dtype) * (factor if is_transposed else factor[rows])
    return out


def _gain_backward(
    grad: Tensor, x: Tensor, gain: Tensor, need_x: bool, need_gain: bool
) -> tuple[Tensor, Tensor]:
    """`grad * gain`, and the sums over rows of `grad * x`; empty where not needed.

    Shapes: grad, x [T, N], gain [N] -> [T, N], [N] in the dtype of gain.
    """
    precise = torch.promote_types(grad.dtype, gain.dtype)
    of_x = grad.new_empty(grad.shape if need_x else 0)
    sums = gain.new_zeros(gain.shape if need_gain else 0)
    for rows in pieces(grad):
        wide = grad[rows].to(precise)
        if need_gain:
            sums += (wide * x[rows].to(precise)).sum(0)
        if need_x:
            of_x[rows] = wide * gain
    return of_x, sums


def _with_gain_compiled(x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    return out if gain_cpu.apply(out, x, gain, bias) else _with_gain(x, gain, bias)


def _apply_gain_compiled(y: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    if not gain_cpu.apply(y, y, gain, bias):
        _apply_gain(y, gain, bias)


def _with_gain_on_rows_compiled(x: Tensor, gain: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if x.is_contiguous():
        return out if gain_cpu.apply_to_rows(out, x, gain) else _with_gain_on_rows(x, gain)
    done = x.t().is_contiguous() and gain_cpu.apply(out.t(), x.t(), gain, None)
    return out if done else _with_gain_on_rows(x, gain)


def _gain_backward_compiled(
    grad: Tensor, x: Tensor, gain: Tensor, need_x: bool, need_gain: bool
) -> tuple[Tensor, Tensor]:
    found = gain_cpu.backward(grad.contiguous(), x.contiguous(), gain, need_x, need_gain)
    return _gain_backward(grad, x, gain, need_x, need_gain) if found is None else found


for _name, _definition, _compiled in (
    ("with_gain", _with_gain, _with_gain_compiled),
    ("apply_gain", _apply_gain, _apply_gain_compiled),
    ("with_gain_on_rows", _with_gain_on_rows, _with_gain_on_rows_compiled),
    ("gain_backward", _gain_backward, _gain_backward_compiled),
):
    LIBRARY.impl(_name, _definition, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _compiled, "CPU")


@torch.library.register_fake("graft::with_gain", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _with_gain_shape(x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("graft::apply_gain", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _apply_gain_shape(y: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    return None


@torch.library.register_fake("graft::with_gain_on_rows", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _with_gain_on_rows_shape(x: Tensor, gain: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("graft::gain_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _gain_backward_shape(
    grad: Tensor, x: Tensor, gain: Tensor, need_x: bool, need_gain: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape if need_x else 0), gain.new_empty(gain.shape if need_gain else 0)


def apply_gain(y: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """`y = gain (y - bias) + bias`, where it lies, without autograd. Shapes: y [T, N], gain, bias [N]."""
    torch.ops.graft.apply_gain(y, gain, bias)


def with_gain_on_rows(x: Tensor, gain: Tensor) -> Tensor:
    """`gain_n x_n` for each row, without autograd. Shapes: x [N, K] of any layout, gain [N] -> as x."""
    result: Tensor = torch.ops.graft.with_gain_on_rows(x, gain)
    return result


def gain_backward(
    grad: Tensor, out: Tensor | None, gain: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `out = gain (y - bias) + bias` for y, and for gain where `out` is given.

    Shapes: grad, out [T, N], gain, bias [N].
    """
    of_y, sums = torch.ops.graft.gain_backward(
        grad, grad if out is None else out, gain, True, out is not None
    )
    return of_y, None if out is None else of_gain(grad, sums, gain, bias)


def of_gain(grad: Tensor, sums: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient for gain of `out = gain (y - bias) + bias`, from the sums over rows of `grad * out`.

    What gain multiplies is recovered from the output, (out - bias) / gain, so that no other tensor of that
    size has to be kept; where gain is 0 its gradient is 0 too. Shapes: grad [T, N], the others [N].
    """
    if bias is not None:
        sums = sums - bias.to(sums.dtype) * grad.sum(0, dtype=sums.dtype)
    return torch.where(gain == 0, 0.0, sums / gain)


class _Gain(torch.autograd.Function):
    """Keeps x, if the gain is trained. Dividing the output would spare it where a later operation keeps that,
    but fails where a gain is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        out = torch.ops.graft.with_gain(x.reshape(-1, x.shape[-1]), gain, None)
        ctx.save_for_backward(gain, *([x] if ctx.needs_input_grad[1] else []))
        result: Tensor = torch.ops.aten._unsafe_view(out, x.shape)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gain, *kept = ctx.saved_tensors
        flat = grads[0].reshape(-1, len(gain))
        need_x, need_gain = ctx.needs_input_grad
        x = kept[0].reshape(flat.shape) if kept else flat
        of_x, of_gain = torch.ops.graft.gain_backward(flat, x, gain, need_x, need_gain)
        return of_x.view(grads[0].shape) if need_x else None, of_gain if need_gain else None


def with_gain(x: Tensor, gain: Tensor) -> Tensor:
    """`x * gain` along the last axis. Shapes: x [..., N], gain [N] in float32 or better -> as x.

    >>> with_gain(torch.ones(1, 2), torch.tensor([2.0, 0.5]))
    tensor([[2.0000, 0.5000]])
    """
    result: Tensor = _Gain.apply(x, gain)  # type: ignore[no-untyped-call]
    return result
