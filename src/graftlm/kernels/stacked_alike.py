"""As `kernels.stacked`, where every adapter has as many rows: their thin products are one batch of products.

With few rows each, eight adapters cost hardly more calls than one. Ranks are filled up with zeros to the
largest at a layer, where an adapter that leaves the layer alone has nothing but zeros.

Legend of shapes: T rows of x, of which L lanes of t rows each come first, K input width, N output width of a
layer, r its largest rank, R the sum of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from graftlm.kernels.adapted_products import Packing, base_output, through_weight
from graftlm.kernels.dropout import add_dropped_lanes, dropped_lanes, kept_share
from graftlm.kernels.sources import Producer


class Change(NamedTuple):
    """What is no tensor of one adapter's change of one layer."""

    lane: int
    scale: float
    dropout: float
    dtype: torch.dtype


class Line(NamedTuple):
    """What is no tensor of one layer."""

    packing: Packing | None
    stored: int
    changes: tuple[Change, ...]

    @property
    def drops(self) -> bool:
        """Whether some change drops values of its input."""
        return any(change.dropout for change in self.changes)


class _Tensors(NamedTuple):
    """Those of one layer, or what belongs to each of them; a, b and seeds change by change."""

    bias: Any
    stored: tuple[Any, ...]
    a: tuple[Any, ...]
    b: tuple[Any, ...]
    seeds: tuple[Any, ...]


def flattened(bias: Any, stored: Sequence[Any], changes: Sequence[tuple[Any, Any, Any]]) -> list[Any]:
    """What `_Alike` takes of one layer: its own tensors, then a, b and seed of each change."""
    return [bias, *stored, *(tensor for change in changes for tensor in change)]


def _told_apart(lines: Sequence[Line], flat: Sequence[Any]) -> list[_Tensors]:
    """The inverse of `flattened`, for all layers."""
    found, left = [], list(flat)
    for line in lines:
        stop = 1 + line.stored
        own, left = left[: stop + 3 * len(line.changes)], left[stop + 3 * len(line.changes) :]
        changes = own[stop:]
        found.append(
            _Tensors(
                own[0], tuple(own[1:stop]), tuple(changes[0::3]), tuple(changes[1::3]), tuple(changes[2::3])
            )
        )
    return found


class Alike(torch.autograd.Function):
    """`rows` of each of `lanes` adapters. Its arguments after x are those of `flattened`, layer by layer."""

    @staticmethod
    def forward(
        ctx: Any,
        lines: tuple[Line, ...],
        lanes: int,
        rows: int,
        producer: Producer | None,
        inputs: Sequence[Tensor],
        x: Tensor,
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        whole, tensors = x.reshape(-1, x.shape[-1]), _told_apart(lines, flat)
        x3 = whole[: lanes * rows].view(lanes, rows, -1)
        factors = [_factors(line, own, lanes, x.dtype) for line, own in zip(lines, tensors, strict=True)]
        thins = _thin(x3, lines, tensors, [a for a, _ in factors])
        outputs = []
        for line, own, s, (_, b) in zip(lines, tensors, thins, factors, strict=True):
            y = base_output(whole, line.packing, own.bias, own.stored)
            if line.changes:
                y[: lanes * rows].view(lanes, rows, -1).baddbmm_(s, b)
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])))
        kept = [one for own in tensors for one in own.stored] + [one for own in tensors for one in own.seeds]
        ctx.save_for_backward(*inputs, *thins, *(tensor for pair in factors for tensor in pair), *kept)
        ctx.lines, ctx.shape, ctx.producer, ctx.inputs = lines, (lanes, rows), producer, len(inputs)
        ctx.ranks = [[len(a) for a in own.a] for own in tensors]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)  # once: activation checkpointing allows no second look
        inputs = [next(saved) for _ in range(ctx.inputs)]
        thins = [next(saved) for _ in ctx.lines]
        factors = [(next(saved), next(saved)) for _ in ctx.lines]
        stored = [[next(saved) for _ in range(line.stored)] for line in ctx.lines]
        seeds = [[next(saved) for _ in line.changes] for line in ctx.lines]
        need_x = ctx.needs_input_grad[5]
        x: Tensor = inputs[0] if ctx.producer is None else ctx.producer(*inputs)
        whole, shape = x.reshape(-1, x.shape[-1]), ctx.shape
        x3, dx = whole[: shape[0] * shape[1]].view(*shape, -1), None
        found, of_thin = list[Any](), list[Tensor | None]()
        for number, (line, grad, s) in enumerate(zip(ctx.lines, grads, thins, strict=True)):
            b = factors[number][1]
            if grad is None or not line.changes:
                found += flattened(None, (None,) * line.stored, [(None, None, None)] * len(line.changes))
                of_thin.append(None)
            else:
                g3 = grad.reshape(-1, grad.shape[-1])[: shape[0] * shape[1]].view(*shape, -1)
                ds = torch.bmm(g3, b.transpose(1, 2))
                of_a = torch.bmm(ds.transpose(1, 2), _dropped(x3, line, seeds[number]))
                of_b = torch.bmm(s.transpose(1, 2), g3)
                changes = _each(line, ctx.ranks[number], of_a, of_b)
                found += flattened(None, (None,) * line.stored, changes)
                of_thin.append(ds)
            if need_x and grad is not None:
                flat = grad.reshape(-1, grad.shape[-1])
                dx = through_weight(dx, flat, None, line.packing, stored[number])
        if need_x:
            dx = torch.zeros_like(whole) if dx is None else dx
            _through_changes(dx, shape, ctx.lines, of_thin, [a for a, _ in factors], seeds)
        return *(None,) * 5, None if dx is None else dx.view(x.shape), *found


def _factors(line: Line, own: _Tensors, lanes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[L, r, K] of all A, [L, r, N] of all B with their scales, rounded once to `dtype`."""
    if not line.changes:
        nothing = torch.empty(0, dtype=dtype)
        return nothing, nothing
    none_a, none_b = own.a[0][:0], own.b[0].t()[:0]
    at = {change.lane: number for number, change in enumerate(line.changes)}
    a = pad_sequence([own.a[at[lane]] if lane in at else none_a for lane in range(lanes)], batch_first=True)
    b = pad_sequence(
        [own.b[at[lane]].t() if lane in at else none_b for lane in range(lanes)], batch_first=True
    )
    return a.to(dtype), b.mul_(_scales(line, b)).to(dtype)


def _scales(line: Line, like: Tensor) -> Tensor:
    """[L, 1, 1], for something [L, ...]: 1 in lanes that leave the layer alone."""
    values = [1.0] * len(like)
    for change in line.changes:
        values[change.lane] = change.scale / kept_share(change.dropout)  # what makes up for dropout
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _thin(
    x3: Tensor, lines: Sequence[Line], tensors: Sequence[_Tensors], all_a: Sequence[Tensor]
) -> Sequence[Tensor]:
    """`drop(x) A^T` of every layer [L, t, r]: one batch where nothing is dropped, which reads x once."""
    ranks = [a.shape[1] if line.changes else 0 for line, a in zip(lines, all_a, strict=True)]
    changed = [a for line, a in zip(lines, all_a, strict=True) if line.changes]
    if not changed:
        return list(all_a)
    if not any(line.drops for line in lines):
        a = changed[0] if len(changed) == 1 else torch.cat(changed, dim=1)
        return list(torch.split(torch.bmm(x3, a.transpose(1, 2)), ranks, dim=2))
    each = zip(lines, tensors, all_a, strict=True)
    return [
        torch.bmm(_dropped(x3, line, own.seeds), a.transpose(1, 2)) if line.changes else a
        for line, own, a in each
    ]


def _dropped(x3: Tensor, line: Line, seeds: Sequence[Tensor | None]) -> Tensor:
    """The input of each change, [L, t, K]; x itself where nothing is dropped."""
    return dropped_lanes(x3, _chances(line, seeds))


def _chances(line: Line, seeds: Sequence[Tensor | None]) -> dict[int, tuple[float, Tensor]]:
    """By lane, where values are dropped."""
    each = zip(line.changes, seeds, strict=True)
    return {change.lane: (change.dropout, seed) for change, seed in each if seed is not None}


def _each(line: Line, ranks: Sequence[int], of_a: Tensor, of_b: Tensor) -> list[tuple[Any, Any, None]]:
    """The gradients of a [r, K] and b [N, r] of every change. Shapes: of_a [L, r, K], of_b [L, r, N]."""
    of_a = of_a.to(line.changes[0].dtype)
    of_b = of_b.to(of_a.dtype)
    of_b.mul_(_scales(line, of_b))
    return [
        (of_a[change.lane, :rank], of_b[change.lane, :rank].t(), None)
        for change, rank in zip(line.changes, ranks, strict=True)
    ]


def _through_changes(
    dx: Tensor,
    shape: tuple[int, int],
    lines: Sequence[Line],
    of_thin: Sequence[Tensor | None],
    all_a: Sequence[Tensor],
    seeds: Sequence[Sequence[Tensor | None]],
) -> None:
    """`dx += drop(dS A)` of every layer. Shapes: dx [T, K], each dS [L, t, r], A [L, r, K]."""
    lanes, rows = shape
    own = dx[: lanes * rows].view(lanes, rows, -1)
    plain = [
        (ds, a)
        for line, ds, a in zip(lines, of_thin, all_a, strict=True)
        if ds is not None and not line.drops
    ]
    if plain:
        ds, a = (each[0] if len(plain) == 1 else None for each in zip(*plain, strict=True))
        ds = torch.cat([one for one, _ in plain], dim=2) if ds is None else ds
        a = torch.cat([one for _, one in plain], dim=1) if a is None else a
        own.baddbmm_(ds, a)
    for line, ds, a, drawn in zip(lines, of_thin, all_a, seeds, strict=True):
        if ds is None or not line.drops:
            continue
        add_dropped_lanes(own, torch.bmm(ds, a), _chances(line, drawn))
