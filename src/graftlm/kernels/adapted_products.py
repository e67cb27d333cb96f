"""The arithmetic of adapted linear layers that read the same input, forward and backward, without autograd.

Legend of shapes: T tokens, K input width, N output width of a layer, r its rank, R the sum of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels import thin_cpu
from graftlm.kernels.dropout import add_dropped, dropped, kept_share
from graftlm.kernels.gain import apply_gain, gain_backward
from graftlm.kernels.ops import LIBRARY
from graftlm.kernels.triton.forms import rows_in_order, triton_form

LIBRARY.define("add_low_rank(Tensor(a!) y, Tensor s, Tensor b, float scale) -> ()")
LIBRARY.define("thin_gradient(Tensor s, Tensor grad, float scale) -> Tensor")
LIBRARY.define("thin_gradient_turned(Tensor s, Tensor grad, float scale) -> Tensor")


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


LIBRARY.impl("add_low_rank", _add_low_rank, "CompositeExplicitAutograd")
LIBRARY.impl("add_low_rank", _add_low_rank_compiled, "CPU")
LIBRARY.impl("add_low_rank", _add_low_rank_by_triton, "CUDA")


@torch.library.register_fake("graft::add_low_rank", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _add_low_rank_shape(y: Tensor, s: Tensor, b: Tensor, scale: float) -> None:
    return None


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


LIBRARY.impl("thin_gradient", _thin_gradient, "CompositeExplicitAutograd")
LIBRARY.impl("thin_gradient", _thin_gradient_compiled, "CPU")
LIBRARY.impl("thin_gradient_turned", _thin_gradient_turned, "CompositeExplicitAutograd")
LIBRARY.impl("thin_gradient_turned", _thin_gradient_turned_compiled, "CPU")


@torch.library.register_fake("graft::thin_gradient", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _thin_gradient_shape(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    precise = torch.promote_types(s.dtype, torch.float32)
    return s.new_empty(s.shape[1], grad.shape[1], dtype=precise)


@torch.library.register_fake("graft::thin_gradient_turned", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _thin_gradient_turned_shape(s: Tensor, grad: Tensor, scale: float) -> Tensor:
    precise = torch.promote_types(s.dtype, torch.float32)
    return s.new_empty(grad.shape[1], s.shape[1], dtype=precise)


class Packing(NamedTuple):
    """How a packed weight is stored, as the operators of `quantised` take it."""

    kind: str
    block: int
    rows: int
    columns: int


class Term(NamedTuple):
    """What is no tensor of one layer."""

    scale: float
    dropout: float
    dtype: torch.dtype
    """Of the trained factors."""
    packing: Packing | None
    stored: int
    """How many tensors the weight has; none where the layer's output is given."""

    @property
    def factor(self) -> float:
        """On the product of x, A and B: the scale, and what makes up for dropout."""
        return self.scale / kept_share(self.dropout)


class Parts(NamedTuple):
    """The tensors of one layer, or what belongs to each of them (a gradient, whether one is needed)."""

    given: Any = None
    a: Any = None
    b: Any = None
    gain: Any = None
    shift: Any = None
    bias: Any = None
    seed: Any = None
    stored: tuple[Any, ...] = ()


_NAMED = len(Parts._fields) - 1


def parted(terms: Sequence[Term], flat: Sequence[Any]) -> list[Parts]:
    """Layer by layer, from one sequence in the order of the fields."""
    ends = list(accumulate(_NAMED + term.stored for term in terms))
    lines = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [Parts._make((*line[:_NAMED], tuple(line[_NAMED:]))) for line in lines]


def flattened(parts: Sequence[Parts]) -> list[Any]:
    """The inverse of `parted`."""
    return [tensor for part in parts for tensor in (*part[:_NAMED], *part.stored)]


def in_dtype(dtype: torch.dtype, parts: Sequence[Parts]) -> list[Parts]:
    """With the factors in the dtype that products are computed in."""
    return [part._replace(a=part.a.to(dtype), b=part.b.to(dtype)) for part in parts]


def thin_products(rows: Tensor, terms: Sequence[Term], parts: Sequence[Parts]) -> Tensor:
    """`drop(x) A^T` of every layer side by side: one product where nothing is dropped, which reads x once.

    Shapes: rows [T, K] -> [T, R].
    """
    if not any(term.dropout for term in terms):
        return rows @ _stacked(parts).t()
    each = zip(terms, parts, strict=True)
    return torch.cat([dropped(rows, term.dropout, part.seed) @ part.a.t() for term, part in each], dim=1)


def output(rows: Tensor, s: Tensor, term: Term, part: Parts) -> Tensor:
    """What one layer gives, in memory of its own. Shapes: rows [T, K], s [T, r] -> [T, N]."""
    if part.given is not None:
        y: Tensor = part.given.reshape(len(rows), -1).clone(memory_format=torch.contiguous_format)
    elif term.packing is None:
        y = F.linear(rows, part.stored[0], part.bias)
    else:
        y = torch.ops.graft.quantised_linear(rows, part.stored, *term.packing, part.bias)
    torch.ops.graft.add_low_rank(y, s, part.b, term.factor)
    if part.gain is not None:
        apply_gain(y, part.gain, part.bias)
    if part.shift is not None:
        y += part.shift.to(y.dtype)
    return y


class Used(NamedTuple):
    """One layer in backward: which of its tensors need a gradient, that of its output (None: the output was
    not used), and the output itself where a gain is trained."""

    term: Term
    part: Parts
    need: Parts
    grad: Tensor | None
    out: Tensor | None

    @property
    def no_gradients(self) -> Parts:
        """Of an output that was not used."""
        return Parts(stored=(None,) * self.term.stored)

    def through_output(self, grad: Tensor) -> tuple[Tensor, Parts]:
        """The gradient [T, N] of `W x` and its change, and the gradients of what is applied upon them."""
        found, flat = self.no_gradients, grad.reshape(-1, grad.shape[-1])
        if self.need.shift:
            total = flat.sum(0, dtype=torch.promote_types(flat.dtype, torch.float32))
            found = found._replace(shift=total.to(self.term.dtype))
        if self.part.gain is not None:
            out = None if self.out is None else self.out.reshape(flat.shape)
            flat, of_gain = gain_backward(flat, out, self.part.gain, self.part.bias)
            found = found._replace(gain=of_gain)
        if self.need.given:
            found = found._replace(given=flat.view(grad.shape))
        return flat, found


def gradients(
    rows: Tensor, thin: Tensor, layers: Sequence[Used], need_x: bool
) -> tuple[Tensor | None, list[Parts]]:
    """The gradient of x (None unless `need_x`), and those of each layer's tensors.

    Shapes: rows [T, K], thin [T, R] as `thin_products` gave it -> [T, K].
    """
    terms, parts = [layer.term for layer in layers], [layer.part for layer in layers]
    ds, dx, found = torch.zeros_like(thin), None, []
    for layer, s, own in zip(layers, _split(thin, parts, dim=1), _split(ds, parts, dim=1), strict=True):
        term, part = layer.term, layer.part
        if layer.grad is None:
            found.append(layer.no_gradients)
            continue
        grad, line = layer.through_output(layer.grad)
        torch.addmm(own, grad, part.b, beta=0, alpha=term.factor, out=own)
        if layer.need.b:
            of_b = torch.ops.graft.thin_gradient_turned(s, grad, term.factor)
            line = line._replace(b=of_b.to(term.dtype))
        if need_x and part.stored:
            dx = _through_weight(dx, grad, term, part)
        found.append(line)
    if need_x:
        dx = torch.zeros_like(rows) if dx is None else dx
        _through_changes(dx, ds, terms, parts)
    of_a = _of_a(rows, ds, terms, parts)
    return dx, [
        line._replace(a=da.to(layer.term.dtype)) if layer.need.a and layer.grad is not None else line
        for layer, line, da in zip(layers, found, of_a, strict=True)
    ]


def _through_weight(dx: Tensor | None, grad: Tensor, term: Term, part: Parts) -> Tensor:
    """`grad W`, added to `dx` where there is one."""
    if term.packing is None:
        weight = part.stored[0]
        return grad @ weight if dx is None else dx.addmm_(grad, weight)
    if dx is None:
        new: Tensor = torch.ops.graft.quantised_linear_backward(grad, part.stored, *term.packing)
        return new
    torch.ops.graft.quantised_linear_accumulate(dx, grad, part.stored, *term.packing)
    return dx


def _through_changes(dx: Tensor, ds: Tensor, terms: Sequence[Term], parts: Sequence[Parts]) -> None:
    """`dx += drop(dS A)` of every layer. Shapes: dx [T, K], ds [T, R]."""
    if not any(term.dropout for term in terms):
        dx.addmm_(ds, _stacked(parts))
        return
    for term, part, own in zip(terms, parts, _split(ds, parts, dim=1), strict=True):
        add_dropped(dx, own @ part.a, term.dropout, part.seed)


def _of_a(rows: Tensor, ds: Tensor, terms: Sequence[Term], parts: Sequence[Parts]) -> Sequence[Tensor]:
    """`dS^T drop(x)` of every layer."""
    product = torch.ops.graft.thin_gradient
    if not any(term.dropout for term in terms):
        return _split(product(ds, rows, 1.0), parts, dim=0)
    each = zip(terms, parts, _split(ds, parts, dim=1), strict=True)
    return [product(own, dropped(rows, term.dropout, part.seed), 1.0) for term, part, own in each]


def _stacked(parts: Sequence[Parts]) -> Tensor:
    first: Tensor = parts[0].a
    return first if len(parts) == 1 else torch.cat([part.a for part in parts])


def _split(tensor: Tensor, parts: Sequence[Parts], *, dim: int) -> Sequence[Tensor]:
    return torch.split(tensor, [len(part.a) for part in parts], dim)
