"""`stacked_linears` against its definition in float64, lane by lane: values, gradients, dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.kernels import stacked_alike, stacked_apart
from graftlm.kernels.adapted import Adapted, Frozen
from graftlm.kernels.adapted_products import Packing
from graftlm.kernels.dropout import keep_mask, kept_share
from graftlm.kernels.stacked import FEW, Share, Stacked, stacked_linears
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme

from .drawn import TOLERANCE, draw

WIDTH, OUT = 18, 13


@dataclass
class Built:
    """A layer with the changes of several adapters, its dense weight, and the seeds that were drawn."""

    stacked: Stacked
    weight: Tensor
    seeds: dict[int, Tensor] = field(default_factory=dict)


def build(
    dtype: torch.dtype,
    spans: list[tuple[int, int]],
    ranks: list[int],
    p: float,
    kind: str,
    upon: str,
    seed: int,
) -> Built:
    """Rank 0: the adapter of that lane leaves the layer alone."""
    precise = torch.promote_types(dtype, torch.float32)
    weight, bias = draw(OUT, WIDTH, dtype=dtype, seed=seed), draw(OUT, dtype=dtype, seed=seed + 1)
    layer = Frozen((weight,), bias)
    if kind != "dense":
        packed = encode(weight, Scheme.parse(kind))
        layer = Frozen(
            tuple(packed.stored), bias, Packing(packed.scheme.kind, packed.scheme.block_size, OUT, WIDTH)
        )
        weight = packed.decode(dtype)
    built, shares = Built(Stacked(layer), weight), []
    for number, ((start, stop), rank) in enumerate(zip(spans, ranks, strict=True)):
        if not rank:
            continue
        own = 10 * number + seed
        a = draw(rank, WIDTH, dtype=precise, seed=own + 2).requires_grad_()
        b = draw(OUT, rank, dtype=precise, seed=own + 3).requires_grad_()
        gain = (
            draw(OUT, dtype=precise, seed=own + 4).abs().add(0.5).requires_grad_() if upon == "gain" else None
        )
        shift = draw(OUT, dtype=precise, seed=own + 5).requires_grad_() if upon == "shift" else None
        dropout = p if number % 2 == 0 else 0.0
        change = Adapted(layer, a, b, 0.5 + number, dropout, gain, shift)
        built.seeds[start] = torch.tensor(own)
        shares.append(Share(start, stop, change, partial(built.seeds.__getitem__, start)))
    built.stacked = Stacked(layer, tuple(shares))
    return built


def definition(built: Built, x: Tensor) -> Tensor:
    """In float64, with leaves of float64 in place of the factors."""
    layer = built.stacked.layer
    y = x @ built.weight.double().T + layer.bias.double()
    pieces, end = [], 0
    for share in built.stacked.shares:
        change, own = share.change, x[share.start : share.stop]
        if change.dropout:
            keep = keep_mask(own.shape, change.dropout, built.seeds[share.start], x.device)
            own = own * keep / kept_share(change.dropout)
        a, b, gain, shift = (
            None if leaf is None else leaf.double()
            for leaf in (change.a, change.b, change.gain, change.shift)
        )
        part = y[share.start : share.stop] + change.scale * (own @ a.T @ b.T)
        if gain is not None:
            part = gain * (part - layer.bias.double()) + layer.bias.double()
        pieces += [y[end : share.start], part if shift is None else part + shift]
        end = share.stop
    return torch.cat([*pieces, y[end:]])


@given(
    lengths=st.one_of(
        st.lists(st.integers(1, 9), min_size=1, max_size=4),
        st.tuples(st.integers(2, 4), st.integers(1, 9)).map(lambda pair: [pair[1]] * pair[0]),
    ),
    ranks=st.lists(st.integers(0, 5), min_size=8, max_size=8),
    p=st.sampled_from([0.0, 0.4]),
    kind=st.sampled_from(["dense", "nf4"]),
    upon=st.sampled_from(["", "", "gain", "shift"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    tail=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_agrees_with_its_definition(
    lengths: list[int], ranks: list[int], p: float, kind: str, upon: str, dtype: torch.dtype, tail: int
) -> None:
    ends = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    spans = list(pairwise(ends))
    x = draw(ends[-1] + tail, WIDTH, dtype=dtype, seed=99).requires_grad_()
    layers = [
        build(dtype, spans, ranks[: len(spans)], p, kind, upon, 1000),
        build(dtype, spans, ranks[-len(spans) :], p, "dense", "", 2000),
    ]
    outputs = stacked_linears(x, [built.stacked for built in layers])
    grads = [draw(*y.shape, dtype=dtype, seed=7 + number) for number, y in enumerate(outputs)]
    leaves = [x, *_leaves(layers)]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    precise = x.detach().double().requires_grad_()
    expected = [definition(built, precise) for built in layers]
    wanted = torch.autograd.grad(
        expected, [precise, *leaves[1:]], [grad.double() for grad in grads], allow_unused=True
    )
    for mine, theirs in zip((*outputs, *found), (*expected, *wanted), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.shape == theirs.shape
            assert _error(mine, theirs) < 2 * TOLERANCE[dtype]


def _error(mine: Tensor, theirs: Tensor) -> float:
    """Relative to the numbers that are summed here, which lie about 4."""
    mine, theirs = mine.detach().double(), theirs.detach().double()
    wrong, size = (mine - theirs).norm(), theirs.norm()
    return float(wrong / (size + 4 * theirs.numel() ** 0.5))


def _leaves(layers: list[Built]) -> list[Tensor]:
    changes = [share.change for built in layers for share in built.stacked.shares]
    each = [leaf for change in changes for leaf in (change.a, change.b, change.gain, change.shift)]
    return [leaf for leaf in each if leaf is not None]


@pytest.mark.parametrize(
    ("spans", "upon", "way"),
    [
        ([(0, 4), (4, 8)], "", stacked_alike.Alike),
        ([(4, 8)], "", stacked_alike.Alike),
        ([(12, 16)], "", stacked_apart.Apart),
        ([(0, 4), (4, 9)], "", stacked_apart.Apart),
        ([(0, 4), (4, 8)], "gain", stacked_apart.Apart),
        ([(0, FEW + 1), (FEW + 1, 2 * FEW + 2)], "", stacked_apart.Apart),
    ],
)
def test_lanes_of_one_length_go_together(
    spans: list[tuple[int, int]], upon: str, way: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[type] = []
    for kind in (stacked_alike.Alike, stacked_apart.Apart):
        monkeypatch.setattr(kind, "apply", _noted(kind, called, kind.apply))
    built = build(torch.float32, spans, [2] * len(spans), 0.0, "dense", upon, 0)
    stacked_linears(draw(spans[-1][1], WIDTH, dtype=torch.float32, seed=1), [built.stacked])
    assert called == [way]


def _noted(kind: type, called: list[type], apply: Callable[..., object]) -> Callable[..., object]:
    def noted(*args: object) -> object:
        called.append(kind)
        return apply(*args)

    return staticmethod(noted)  # type: ignore[return-value]


def test_no_change_at_all_is_the_layers_themselves() -> None:
    built = build(torch.float32, [], [], 0.0, "dense", "", 0)
    x = draw(5, WIDTH, dtype=torch.float32, seed=1)
    expected = torch.nn.functional.linear(x, built.weight, built.stacked.layer.bias)
    assert torch.equal(stacked_linears(x, [built.stacked])[0], expected)
