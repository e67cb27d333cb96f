"""As `kernels.stacked`, adapter by adapter: the arithmetic of `kernels.adapted` on the rows of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels.adapted_products import (
    Packing,
    Parts,
    Term,
    Used,
    add_change,
    base_output,
    by_rank,
    flattened,
    in_dtype,
    into_thin,
    parted,
    thin_products,
    through_changes,
    through_weight,
    with_gradients_of_a,
)
from graftlm.kernels.sources import Producer


class Base(NamedTuple):
    """What is no tensor of one layer."""

    packing: Packing | None
    stored: int


class Lane(NamedTuple):
    """What is no tensor of one adapter: its rows, the layers that it changes, and how."""

    start: int
    stop: int
    layers: tuple[int, ...]
    terms: tuple[Term, ...]


class _Layer(NamedTuple):
    """The tensors of one frozen layer."""

    bias: Tensor | None
    stored: tuple[Tensor, ...]


def _told_apart(
    bases: Sequence[Base], lanes: Sequence[Lane], flat: Sequence[Any]
) -> tuple[list[_Layer], list[list[Parts]]]:
    """The tensors of the layers, and those of each lane, layer by layer; or what belongs to each of them."""
    ends = list(accumulate((1 + base.stored for base in bases), initial=0))
    layers = [_Layer(flat[start], tuple(flat[start + 1 : stop])) for start, stop in pairwise(ends)]
    width = len(Parts._fields) - 1
    ends = list(accumulate((width * len(lane.terms) for lane in lanes), initial=ends[-1]))
    spans = zip(lanes, pairwise(ends), strict=True)
    return layers, [parted(lane.terms, flat[start:stop]) for lane, (start, stop) in spans]


class Apart(torch.autograd.Function):
    """Its arguments after x are those of `_Layer`, layer by layer, then those of `Parts`, lane by lane.
    `producer` makes x from `inputs`; without one, they are x itself."""

    @staticmethod
    def forward(
        ctx: Any,
        bases: tuple[Base, ...],
        lanes: tuple[Lane, ...],
        producer: Producer | None,
        inputs: Sequence[Tensor],
        x: Tensor,
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        layers, given = _told_apart(bases, lanes, flat)
        each = zip(bases, layers, strict=True)
        ys = [base_output(rows, base.packing, layer.bias, layer.stored) for base, layer in each]
        thins = []
        for lane, kept in zip(lanes, given, strict=True):
            parts, own = in_dtype(x.dtype, kept), slice(lane.start, lane.stop)
            thins.append(thin_products(rows[own], lane.terms, parts))
            of_layers = by_rank(thins[-1], parts, dim=1)
            for index, term, part, s in zip(lane.layers, lane.terms, parts, of_layers, strict=True):
                add_change(ys[index][own], s, term, part)
        outputs = [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in ys]
        with_gain = _with_gain(lanes, _told_apart(bases, lanes, ctx.needs_input_grad[5:])[1])
        tensors = [tensor for layer in layers for tensor in (layer.bias, *layer.stored)]
        for kept in given:
            tensors += flattened([part._replace(shift=None) for part in kept])
        ctx.save_for_backward(*inputs, *thins, *(outputs[index] for index in with_gain), *tensors)
        ctx.bases, ctx.lanes, ctx.producer = bases, lanes, producer
        ctx.inputs, ctx.with_gain, ctx.dtype = len(inputs), with_gain, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)  # once: activation checkpointing allows no second look
        inputs = [next(saved) for _ in range(ctx.inputs)]
        thins = [next(saved) for _ in ctx.lanes]
        outputs = {index: next(saved).flatten(0, -2) for index in ctx.with_gain}
        layers, given = _told_apart(ctx.bases, ctx.lanes, list(saved))
        need_x, *rest = ctx.needs_input_grad[4:]
        needed = _told_apart(ctx.bases, ctx.lanes, rest)[1]
        x: Tensor = inputs[0] if ctx.producer is None else ctx.producer(*inputs)
        rows = x.reshape(-1, x.shape[-1])
        flat = _Gradients(grads)
        found, of_thin = list[Any](), []
        for lane, thin, kept, needs in zip(ctx.lanes, thins, given, needed, strict=True):
            parts = in_dtype(ctx.dtype, kept)
            ds, own = _through_lane(lane, rows, thin, parts, needs, flat, outputs)
            found += own
            of_thin.append((ds, parts))
        dx = _through_layers(rows, flat, ctx.bases, layers) if need_x else None
        for lane, (ds, parts) in zip(ctx.lanes, of_thin, strict=True):
            if dx is not None:
                through_changes(dx[lane.start : lane.stop], ds, lane.terms, parts)
        of_bases = (None,) * sum(1 + base.stored for base in ctx.bases)
        return *(None,) * 4, None if dx is None else dx.view(x.shape), *of_bases, *found


def _with_gain(lanes: Sequence[Lane], needed: Sequence[Sequence[Parts]]) -> list[int]:
    """The layers whose outputs are kept, for a gain that is trained."""
    each = [zip(lane.layers, needs, strict=True) for lane, needs in zip(lanes, needed, strict=True)]
    return sorted({index for pairs in each for index, need in pairs if need.gain})


class _Gradients:
    """Those of the outputs, each [T, N] (None: not used). What is changed is a copy."""

    def __init__(self, grads: Sequence[Tensor | None]) -> None:
        self.flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        self._own = set[int]()

    def put(self, index: int, rows: slice, values: Tensor) -> None:
        """These rows of one of them, multiplied with a gain."""
        whole = self.flat[index]
        assert whole is not None
        if index not in self._own:
            self._own.add(index)
            self.flat[index] = whole = whole.clone()
        whole[rows] = values


def _through_lane(
    lane: Lane,
    rows: Tensor,
    thin: Tensor,
    parts: Sequence[Parts],
    needs: Sequence[Parts],
    grads: _Gradients,
    outputs: Mapping[int, Tensor],
) -> tuple[Tensor, list[Any]]:
    """The gradient of the thin products of one adapter, and those of its tensors, as `flattened`.

    Shapes: rows [T, K], thin [t, R] -> [t, R].
    """
    own, ds = slice(lane.start, lane.stop), torch.zeros_like(thin)
    layers, found = list[Used](), list[Parts]()
    each = zip(lane.layers, lane.terms, parts, needs, strict=True)
    columns = zip(by_rank(thin, parts, dim=1), by_rank(ds, parts, dim=1), strict=True)
    for (index, term, part, need), (s, of_s) in zip(each, columns, strict=True):
        grad = grads.flat[index]
        out = outputs[index][own] if need.gain else None
        layer = Used(term, part, need, None if grad is None else grad[own], out)
        through, _, line = into_thin(layer, s, of_s)
        if through is not None and part.gain is not None:
            grads.put(index, own, through)
        layers.append(layer)
        found.append(line)
    return ds, flattened(with_gradients_of_a(rows[own], ds, layers, found))


def _through_layers(
    rows: Tensor, grads: _Gradients, bases: Sequence[Base], layers: Sequence[_Layer]
) -> Tensor:
    """The gradient of x without that through the changes. Shapes: rows [T, K] -> [T, K]."""
    dx = None
    for grad, base, layer in zip(grads.flat, bases, layers, strict=True):
        if grad is not None:
            dx = through_weight(dx, grad, None, base.packing, layer.stored)
    return torch.zeros_like(rows) if dx is None else dx
