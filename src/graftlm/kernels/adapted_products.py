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

from graftlm.kernels.dropout import add_dropped, dropped, kept_share
from graftlm.kernels.gain import gain_backward, of_gain, with_gain_on_rows
from graftlm.kernels.thin import add_low_rank, thin_gradient, thin_gradient_and_sums, thin_gradient_turned


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
    else:
        y = base_output(rows, term.packing, part.bias, part.stored)
    add_change(y, s, term, part)
    return y


def base_output(
    rows: Tensor, packing: Packing | None, bias: Tensor | None, stored: Sequence[Tensor]
) -> Tensor:
    """`x W^T + bias` of a frozen layer. Shapes: rows [T, K] -> [T, N]."""
    if packing is None:
        return F.linear(rows, stored[0], bias)
    y: Tensor = torch.ops.graft.quantised_linear(rows, stored, *packing, bias)
    return y


def add_change(y: Tensor, s: Tensor, term: Term, part: Parts) -> None:
    """What is added to `x W^T + bias`, or multiplied with it, where it lies. Shapes: y [T, N], s [T, r]."""
    add_low_rank(y, s, part.b, term.factor, part.gain, part.bias)
    if part.shift is not None:
        y += part.shift.to(y.dtype)


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

    def multiplies_weight(self, tokens: int) -> bool:
        """Whether it is the weight that backward multiplies by the gain, and not the gradient: a dense one
        with no more values than the gradient has."""
        width: int = self.part.a.shape[1]
        return self.term.packing is None and bool(self.part.stored) and width <= tokens

    def through_output(self, grad: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None, Parts]:
        """The gradient [T, N] of `W x` and its change, a gain that it still has to be multiplied by, and the
        gradients of what is applied upon them. Shapes: grad [..., N], s [T, r]."""
        found, flat, gain = self.no_gradients, grad.reshape(-1, grad.shape[-1]), self.part.gain
        if self.need.shift:
            total = flat.sum(0, dtype=torch.promote_types(flat.dtype, torch.float32))
            found = found._replace(shift=total.to(self.term.dtype))
        out = None if self.out is None else self.out.reshape(flat.shape)
        if gain is not None and not self.multiplies_weight(len(flat)):
            flat, of_the_gain = gain_backward(flat, out, gain, self.part.bias)
            found, gain = found._replace(gain=of_the_gain), None
        elif gain is not None and out is not None:
            of_b, sums = thin_gradient_and_sums(s, flat, out, self.term.factor)
            found = found._replace(b=of_b, gain=of_gain(flat, sums, gain, self.part.bias))
        if self.need.b and found.b is None:
            found = found._replace(b=thin_gradient_turned(s, flat, self.term.factor))
        if self.need.b:
            of_b = found.b if gain is None else found.b * gain.unsqueeze(1)
            found = found._replace(b=of_b.to(self.term.dtype))
        if self.need.given:
            found = found._replace(given=flat.view(grad.shape))
        return flat, gain, found


def gradients(
    rows: Tensor, thin: Tensor, layers: Sequence[Used], need_x: bool
) -> tuple[Tensor | None, list[Parts]]:
    """The gradient of x (None unless `need_x`), and those of each layer's tensors.

    Shapes: rows [T, K], thin [T, R] as `thin_products` gave it -> [T, K].
    """
    terms, parts = [layer.term for layer in layers], [layer.part for layer in layers]
    ds, dx, found = torch.zeros_like(thin), None, []
    for layer, s, own in zip(layers, by_rank(thin, parts, dim=1), by_rank(ds, parts, dim=1), strict=True):
        grad, gain, line = into_thin(layer, s, own)
        found.append(line)
        if need_x and grad is not None and layer.part.stored:
            dx = through_weight(dx, grad, gain, layer.term.packing, layer.part.stored)
    if need_x:
        dx = torch.zeros_like(rows) if dx is None else dx
        through_changes(dx, ds, terms, parts)
    return dx, with_gradients_of_a(rows, ds, layers, found)


def into_thin(layer: Used, s: Tensor, ds: Tensor) -> tuple[Tensor | None, Tensor | None, Parts]:
    """`Used.through_output`, or nothing where the output was not used; the gradient of s goes into `ds`.

    Shapes: s, ds [T, r].
    """
    if layer.grad is None:
        return None, None, layer.no_gradients
    grad, gain, found = layer.through_output(layer.grad, s)
    b = layer.part.b if gain is None else with_gain_on_rows(layer.part.b, gain)
    torch.addmm(ds, grad, b, beta=0, alpha=layer.term.factor, out=ds)
    return grad, gain, found


def with_gradients_of_a(
    rows: Tensor, ds: Tensor, layers: Sequence[Used], found: Sequence[Parts]
) -> list[Parts]:
    """The gradients `found` so far, with those of each A. Shapes: rows [T, K], ds [T, R]."""
    of_a = _of_a(rows, ds, [layer.term for layer in layers], [layer.part for layer in layers])
    return [
        line._replace(a=da.to(layer.term.dtype)) if layer.need.a and layer.grad is not None else line
        for layer, line, da in zip(layers, found, of_a, strict=True)
    ]


def through_weight(
    dx: Tensor | None, grad: Tensor, gain: Tensor | None, packing: Packing | None, stored: Sequence[Tensor]
) -> Tensor:
    """`grad W`, with a gain on the rows of W if there is one, added to `dx` where there is one."""
    if packing is None:
        weight = stored[0] if gain is None else with_gain_on_rows(stored[0], gain)
        return grad @ weight if dx is None else dx.addmm_(grad, weight)
    if dx is None:
        new: Tensor = torch.ops.graft.quantised_linear_backward(grad, stored, *packing)
        return new
    torch.ops.graft.quantised_linear_accumulate(dx, grad, stored, *packing)
    return dx


def through_changes(dx: Tensor, ds: Tensor, terms: Sequence[Term], parts: Sequence[Parts]) -> None:
    """`dx += drop(dS A)` of every layer. Shapes: dx [T, K], ds [T, R]."""
    if not any(term.dropout for term in terms):
        dx.addmm_(ds, _stacked(parts))
        return
    for term, part, own in zip(terms, parts, by_rank(ds, parts, dim=1), strict=True):
        add_dropped(dx, own @ part.a, term.dropout, part.seed)


def _of_a(rows: Tensor, ds: Tensor, terms: Sequence[Term], parts: Sequence[Parts]) -> Sequence[Tensor]:
    """`dS^T drop(x)` of every layer."""
    if not any(term.dropout for term in terms):
        return by_rank(thin_gradient(ds, rows, 1.0), parts, dim=0)
    each = zip(terms, parts, by_rank(ds, parts, dim=1), strict=True)
    return [thin_gradient(own, dropped(rows, term.dropout, part.seed), 1.0) for term, part, own in each]


def _stacked(parts: Sequence[Parts]) -> Tensor:
    first: Tensor = parts[0].a
    return first if len(parts) == 1 else torch.cat([part.a for part in parts])


def by_rank(tensor: Tensor, parts: Sequence[Parts], *, dim: int) -> Sequence[Tensor]:
    """What belongs to each layer of a tensor with R columns (or rows)."""
    return torch.split(tensor, [len(part.a) for part in parts], dim)
