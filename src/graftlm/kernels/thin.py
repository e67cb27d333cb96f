"""Products with a thin side: what low-rank factors add to an output, and the gradients of the factors.

A gain on the columns of the output, and the sums that its own gradient needs, go along in the same passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import thin_cpu
from graftlm.kernels.gain import apply_gain
from graftlm.kernels.ops import LIBRARY
from graftlm.kernels.reference import pieces
from graftlm.kernels.triton.forms import rows_in_order, triton_form

LIBRARY.define("add_low_rank(Tensor(a!) y, Tensor s, Tensor b, float scale) -> ()")
LIBRARY.define(
    "add_low_rank_with_gain(Tensor(a!) y, Tensor s, Tensor b, float scale, Tensor gain, Tensor? bias) -> ()"
)
LIBRARY.define("thin_gradient(Tensor s, Tensor grad, float scale) -> Tensor")
LIBRARY.define("thin_gradient_turned(Tensor s, Tensor grad, float scale) -> Tensor")
LIBRARY.define("thin_gradient_and_sums(Tensor s, Tensor grad, Tensor other, float scale) -> (Tensor, Tensor)")


def _add_low_rank(y: Tensor, s: Tensor, b: Tensor, scale: float) -> None:
    """`y += scale * s b^T`. Shapes: y [T, N], s [T, r] with any row stride, b [N, r], all of one dtype."""
    y.addmm_(s, b.t(), alpha=scale)


def _add_low_rank_compiled(y: Tensor, s: Tensor, b: Tensor, scale: float) -> None:
    if not thin_cpu.add(y, s, b, scale):
        _add_low_rank(y, s, b, scale)


def _add_low_rank_by_triton(y: Tensor, s: Tensor, b: Tensor, scale: float) -> None:
    form = triton_form("low_rank_into", y, s, b) if y.stride(1) == 1 else None
    if form is None:
        _add_low_rank(y, s, b, scale)
    else:
        form(y, y, rows_in_order(s), b, scale)


def _add_low_rank_with_gain(
    y: Tensor, s: Tensor, b: Tensor, scale: float, gain: Tensor, bias: Tensor | None
) -> None:
    """`y = gain * (y + scale * s b^T - bias) + bias`; gain [N] in float32 or better, bias [N]."""
    torch.ops.graft.add_low_rank(y, s, b, scale)
    apply_gain(y, gain, bias)


def _add_low_rank_with_gain_compiled(
    y: Tensor, s: Tensor, b: Tensor, scale: float, gain: Tensor, bias: Tensor | None
) -> None:
    if not thin_cpu.add_with_gain(y, s, b, scale, gain, bias):
        _add_low_rank_with_gain(y, s, b, scale, gain, bias)


def _thin_gradient(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    """`scale * s^T grad` in float32 or wider, rounded before too where torch rounds its products.

    Shapes: s [T, r] with any row stride, grad [T, N], both of one dtype -> [r, N].
    """
    turned = s.t().contiguous()  # so the product with a wide gradient is faster
    return (turned @ grad).to(torch.promote_types(s.dtype, torch.float32)).mul_(scale)


def _thin_gradient_compiled(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    found = thin_cpu.gradient(s, grad, scale)
    return _thin_gradient(s, grad, scale) if found is None else found


def _thin_gradient_turned(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    """`thin_gradient` with rows for columns, in memory too: [N, r]."""
    return _thin_gradient(s, grad, scale).t().contiguous()


def _thin_gradient_turned_compiled(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    found = thin_cpu.gradient_turned(s, grad, scale)
    return _thin_gradient_turned(s, grad, scale) if found is None else found


def _thin_gradient_and_sums(s: Tensor, grad: Tensor, other: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`thin_gradient_turned`, and the sums over rows of `grad * other` [T, N] -> [N, r], [N]."""
    precise = torch.promote_types(grad.dtype, torch.float32)
    sums = grad.new_zeros(grad.shape[1], dtype=precise)
    for rows in pieces(grad):
        sums += (grad[rows].to(precise) * other[rows].to(precise)).sum(0)
    return torch.ops.graft.thin_gradient_turned(s, grad, scale), sums


def _thin_gradient_and_sums_compiled(
    s: Tensor, grad: Tensor, other: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    found = thin_cpu.gradient_and_sums(s, grad, other, scale)
    return _thin_gradient_and_sums(s, grad, other, scale) if found is None else found


for _name, _definition, _compiled in (
    ("add_low_rank", _add_low_rank, _add_low_rank_compiled),
    ("add_low_rank_with_gain", _add_low_rank_with_gain, _add_low_rank_with_gain_compiled),
    ("thin_gradient", _thin_gradient, _thin_gradient_compiled),
    ("thin_gradient_turned", _thin_gradient_turned, _thin_gradient_turned_compiled),
    ("thin_gradient_and_sums", _thin_gradient_and_sums, _thin_gradient_and_sums_compiled),
):
    LIBRARY.impl(_name, _definition, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _compiled, "CPU")
LIBRARY.impl("add_low_rank", _add_low_rank_by_triton, "CUDA")


@torch.library.register_fake("graft::add_low_rank", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _add_low_rank_shape(y: Tensor, s: Tensor, b: Tensor, scale: float) -> None:
    return None


@torch.library.register_fake("graft::add_low_rank_with_gain", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _add_low_rank_with_gain_shape(
    y: Tensor, s: Tensor, b: Tensor, scale: float, gain: Tensor, bias: Tensor | None
) -> None:
    return None


@torch.library.register_fake("graft::thin_gradient", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _thin_gradient_shape(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    precise = torch.promote_types(s.dtype, torch.float32)
    return s.new_empty(s.shape[1], grad.shape[1], dtype=precise)


@torch.library.register_fake("graft::thin_gradient_turned", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _thin_gradient_turned_shape(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    precise = torch.promote_types(s.dtype, torch.float32)
    return s.new_empty(grad.shape[1], s.shape[1], dtype=precise)


@torch.library.register_fake("graft::thin_gradient_and_sums", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _thin_gradient_and_sums_shape(
    s: Tensor, grad: Tensor, other: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(s.dtype, torch.float32)
    out = s.new_empty(grad.shape[1], s.shape[1], dtype=precise)
    return out, out.new_empty(grad.shape[1])


def add_low_rank(
    y: Tensor, s: Tensor, b: Tensor, scale: float, gain: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """`y += scale * s b^T` where it lies; with a gain, `y = gain * (y + scale * s b^T - bias) + bias`.

    Shapes: y [T, N], s [T, r] with any row stride, b [N, r], all of one dtype; gain [N] in float32 or better,
    bias [N].
    """
    if gain is None:
        torch.ops.graft.add_low_rank(y, s, b, scale)
    else:
        torch.ops.graft.add_low_rank_with_gain(y, s, b, scale, gain, bias)


def thin_gradient(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    """`scale * s^T grad` in float32 or wider. Shapes: s [T, r] with any row stride, grad [T, N] -> [r, N]."""
    result: Tensor = torch.ops.graft.thin_gradient(s, grad, scale)
    return result


def thin_gradient_turned(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    """`scale * grad^T s`, as `thin_gradient`. Shapes: s [T, r], grad [T, N] -> [N, r]."""
    result: Tensor = torch.ops.graft.thin_gradient_turned(s, grad, scale)
    return result


def thin_gradient_and_sums(s: Tensor, grad: Tensor, other: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`thin_gradient_turned`, and the sums over rows of `grad * other` from the same pass.

    Shapes: s [T, r], grad, other [T, N] -> [N, r], [N], in float32 or wider.
    """
    found, sums = torch.ops.graft.thin_gradient_and_sums(s, grad, other, scale)
    return found, sums
