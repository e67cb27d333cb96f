"""One layer with several adapters on it, each for the tokens of its lane."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from graftlm.core.errors import AdapterError
from graftlm.kernels.stacked import Share, Stacked
from graftlm.methods.base import LayerAdapter, SiteAdapter
from graftlm.methods.lanes import Lane, Lanes
from graftlm.quant.frozen import frozen

PartOf = Callable[[str], SiteAdapter | None]
"""The part that an adapter has at this layer, if it has one."""


def tokens_in(x: Tensor) -> torch.Size:
    """The shape of what has a value, or a vector of them, for every token: ids, or hidden states."""
    return x.shape[:-1] if x.is_floating_point() else x.shape


def product(base: nn.Module, part_of: PartOf, lanes: Lanes, x: Tensor) -> Stacked | None:
    """What the layer computes of `x`, as one product with the changes of all adapters; None where a part is
    of another kind, or the layer is more than its product."""
    layer = frozen(base, x)
    if layer is None:
        return None
    shares, none = [], [Lane(name, 0, 0) for name in lanes.generators]
    for lane in lanes.of(tokens_in(x).numel()) or none:
        part = part_of(lane.name)
        if part is None:
            continue
        change = part.change_of(layer, base)
        if change is None:
            return None
        if lane.stop > lane.start:
            shares.append(Share(lane.start, lane.stop, change, partial(lanes.new_seed, lane.name, id(base))))
    return Stacked(layer, tuple(shares))


def output(base: nn.Module, part_of: PartOf, lanes: Lanes, x: Tensor) -> Tensor:
    """What the layer gives for `x`, lane by lane; one call of the base serves all parts that change only what
    it gives."""
    shape = tokens_in(x)
    total, flat = shape.numel(), x.flatten(0, len(shape) - 1)
    pieces = [(lane, part_of(lane.name)) for lane in lanes.of(total)]
    ends = [0, *(lane.stop for lane, _ in pieces)]
    if any(lane.start != end for (lane, _), end in zip(pieces, ends, strict=False)):
        raise AdapterError("Lanes lie one after the other, without tokens between them.")
    if ends[-1] < total or not pieces:
        pieces.append((Lane("", ends[-1], total), None))
    with_base = any(part is None or _acts_on_output(part) for _, part in pieces)
    whole = base(x).flatten(0, len(shape) - 1) if with_base else None
    found = []
    for lane, part in pieces:
        own = flat[lane.start : lane.stop].unflatten(0, _shape_of(lane, shape))
        given = None if whole is None else whole[lane.start : lane.stop].unflatten(0, _shape_of(lane, shape))
        draws = part is not None and part.training
        with lanes.drawing(lane.name, id(base)) if draws else nullcontext():
            found.append(_piece(base, part, own, given).flatten(0, len(shape) - 1))
    joined: Tensor = torch.cat(found).unflatten(0, shape)
    return joined


def _piece(base: nn.Module, part: SiteAdapter | None, x: Tensor, given: Tensor | None) -> Tensor:
    """What one part gives for its tokens. `given` is what the layer gives for them."""
    if part is None or _acts_on_output(part):
        assert given is not None
        return given if part is None else part.post(x, given)
    found: Any = part(base, x)
    if not isinstance(found, Tensor):
        raise AdapterError(f"{type(part).__name__} gives more than one tensor, which cannot be stacked.")
    return found


def _shape_of(lane: Lane, shape: torch.Size) -> tuple[int, ...]:
    """Of a lane's tokens: whole rows of a padded batch, or a part of the one row of a flat one."""
    count = lane.stop - lane.start
    if len(shape) == 1:
        return (count,)
    *rows, width = shape
    return (1, count) if count % width or rows == [1] else (count // width, width)


def _acts_on_output(part: SiteAdapter) -> TypeGuard[LayerAdapter]:
    """Whether the part leaves the layer's input alone."""
    return isinstance(part, LayerAdapter) and type(part).pre is LayerAdapter.pre


def refuse_arguments(rest: Any, kwargs: Any) -> None:
    """Layers that are called with more than one tensor see tokens in a way that is not known here.

    Raises:
        AdapterError: there are such arguments.
    """
    if rest or kwargs:
        raise AdapterError(
            "A layer with an adapter was called with more than its input.",
            meaning="Which of these arguments go with which tokens is not known, so adapters cannot share "
            "a batch there.",
            fix="Train these adapters one after the other.",
        )
