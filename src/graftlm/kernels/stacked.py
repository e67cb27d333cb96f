"""Frozen linear layers that read one input, and changes of several adapters, each on rows of its own.

y_i[rows of m] = gain_mi * (x W_i^T + s_mi drop_m(x) A_mi^T B_mi^T) + bias_i + shift_mi

The product with the frozen weight is taken once for the rows of all adapters. Everything else is the
arithmetic of `kernels.adapted` on consecutive rows, so an adapter gets what it would get alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from graftlm.kernels import stacked_alike, stacked_apart
from graftlm.kernels.adapted import Adapted, Frozen, adapted_linears
from graftlm.kernels.adapted_products import Term
from graftlm.kernels.sources import Producer, source_of

FEW = 512
"""Rows of each adapter up to which one batch of products is faster than one product after the other."""
USED = 0.5
"""Share of the lanes up to a layer's last one that must change it for that; the others count as zeros."""


@dataclass(frozen=True)
class Share:
    """The change of one adapter on the rows from `start` to before `stop` of a layer's input.

    `change` is of the layer itself; `new_seed` draws the adapter's own seed of dropout.
    """

    start: int
    stop: int
    change: Adapted
    new_seed: Callable[[], Tensor]


@dataclass(frozen=True)
class Stacked:
    """A layer and the shares of several adapters, in the order of their rows; other rows are the layer's."""

    layer: Frozen
    shares: tuple[Share, ...] = ()


def linears(x: Tensor, ones: Sequence[Adapted | Stacked]) -> tuple[Tensor, ...]:
    """What these layers give for one input, whether one adapter or several change them."""
    stacked = [one for one in ones if isinstance(one, Stacked)]
    if stacked:
        assert len(stacked) == len(ones), "layers with one input are stacked together"
        return stacked_linears(x, stacked)
    return adapted_linears(x, [one for one in ones if isinstance(one, Adapted)])


def stacked_linears(x: Tensor, ones: Sequence[Stacked]) -> tuple[Tensor, ...]:
    """What these layers give for one input. Shapes: x [..., K] -> [..., N_i] each, in the dtype of x.

    >>> import torch
    >>> layer = Frozen((torch.eye(2),))
    >>> change = Adapted(layer, torch.ones(1, 2), torch.ones(2, 1), scale=0.5)
    >>> share = Share(1, 2, change, new_seed=lambda: torch.tensor(0))
    >>> stacked_linears(torch.ones(2, 2), [Stacked(layer, (share,))])[0].tolist()
    [[1.0, 1.0], [2.0, 2.0]]
    """
    source = source_of(x)
    producer, inputs = (None, (x,)) if source is None else (source.producer, source.inputs)
    spans = sorted({(share.start, share.stop) for one in ones for share in one.shares})
    apply = _alike if _are_alike(ones, spans) else _apart
    return apply(x, ones, spans, producer, inputs)


def _are_alike(ones: Sequence[Stacked], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether all lanes have the same few rows, from the first row on, most of them are used here, and what
    they add is nothing but low-rank products."""
    length = spans[0][1] - spans[0][0] if spans else 0
    if not 0 < length <= FEW or len(spans) < USED * spans[-1][1] / length:
        return False
    changes = [share.change for one in ones for share in one.shares]
    is_even = all(stop - start == length and start % length == 0 for start, stop in spans)
    is_plain = all(change.gain is None and change.shift is None for change in changes)
    return is_even and is_plain and len({change.b.dtype for change in changes}) == 1


def _alike(
    x: Tensor,
    ones: Sequence[Stacked],
    spans: Sequence[tuple[int, int]],
    producer: Producer | None,
    inputs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    rows = spans[0][1] - spans[0][0]
    lines, flat = [], []
    for one in ones:
        changes, tensors = [], []
        for share in one.shares:
            change, lane = share.change, share.start // rows
            seed = share.new_seed() if change.dropout > 0.0 else None
            changes.append(stacked_alike.Change(lane, change.scale, change.dropout, change.b.dtype))
            tensors.append((change.a, change.b, seed))
        layer = one.layer
        lines.append(stacked_alike.Line(layer.packing, len(layer.stored), tuple(changes)))
        flat += stacked_alike.flattened(layer.bias, layer.stored, tensors)
    lanes = spans[-1][1] // rows
    outputs: tuple[Tensor, ...] = stacked_alike.Alike.apply(  # type: ignore[no-untyped-call]
        tuple(lines), lanes, rows, producer, inputs, x, *flat
    )
    return outputs


def _apart(
    x: Tensor,
    ones: Sequence[Stacked],
    spans: Sequence[tuple[int, int]],
    producer: Producer | None,
    inputs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    bases = tuple(stacked_apart.Base(one.layer.packing, len(one.layer.stored)) for one in ones)
    flat = [tensor for one in ones for tensor in (one.layer.bias, *one.layer.stored)]
    lanes = []
    for start, stop in spans:
        layers, terms = [], []
        for index, one in enumerate(ones):
            for share in one.shares:
                if (share.start, share.stop) != (start, stop):
                    continue
                change = share.change
                seed = share.new_seed() if change.dropout > 0.0 else None
                layers.append(index)
                terms.append(Term(change.scale, change.dropout, change.b.dtype, None, 0))
                flat += [None, change.a, change.b, change.gain, change.shift, one.layer.bias, seed]
        lanes.append(stacked_apart.Lane(start, stop, tuple(layers), tuple(terms)))
    outputs: tuple[Tensor, ...] = stacked_apart.Apart.apply(  # type: ignore[no-untyped-call]
        bases, tuple(lanes), producer, inputs, x, *flat
    )
    return outputs
