"""Which trials go on: successive halving for one objective or several.

Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934): of the trials that reached a rung, the
best third goes on to the next. With several objectives "best" is a matter of choice (Schmucker et al. 2021,
arXiv 2106.12639): here every second place goes by quality alone, the others to the layers of the front,
spread over each by farthest-first (an epsilon net). A layer ends where trials are worse beyond noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graftlm.search.pareto import Candidate, layers

LEAST_PLACES = 2
"""Trials that go on at least: the best at one rung need not be the best at the next."""
LEAST_STEPS = 10
"""Optimizer steps below which a measurement says nothing of the end of a run."""
REDUCTION = 3
"""One of so many trials goes on at each rung."""


def rung_count(total_steps: int, reduction: int = REDUCTION, least: int = LEAST_STEPS) -> int:
    """How often runs of this length are measured, their end included.

    >>> rung_count(180), rung_count(40), rung_count(12)
    (3, 2, 1)
    """
    return 1 + sum(total_steps / reduction**power >= least for power in (1, 2))


def rung_steps(total_steps: int, count: int, reduction: int = REDUCTION) -> tuple[int, ...]:
    """The steps at which a run is measured; the last is its end.

    >>> rung_steps(180, 3), rung_steps(40, 2)
    ((20, 60, 180), (13, 40))
    """
    return tuple(max(1, round(total_steps / reduction**power)) for power in reversed(range(count)))


def order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The order in which trials of one rung go on."""
    by_quality = sorted(candidates, key=lambda one: (one.score.value, one.costs, one.number))
    if not any(one.costs for one in candidates):
        return by_quality
    spread = [one for layer in layers(candidates) for one in _farthest_first(layer)]
    found: dict[int, Candidate] = {}
    for pair in zip(by_quality, spread, strict=True):
        for one in pair:
            found.setdefault(one.number, one)
    return list(found.values())


def promoted(
    rung: Sequence[Candidate], gone_on: int, *, is_complete: bool, reduction: int = REDUCTION
) -> list[Candidate]:
    """Those of a rung that may go on, in order.

    Args:
        rung: every trial that reached the rung.
        gone_on: how many of them went on already.
        is_complete: no other trial can come; then the share is rounded up, so that somebody arrives.
    """
    share = places(len(rung), reduction) if is_complete else math.floor(len(rung) / reduction)
    return order(rung)[:share] if share > gone_on else []


def places(arrived: int, reduction: int = REDUCTION) -> int:
    """How many of those that arrived at a rung go on once nobody else can come.

    >>> [places(count) for count in (24, 8, 3, 1)]
    [8, 3, 2, 1]
    """
    return min(arrived, max(LEAST_PLACES, math.ceil(arrived / reduction)))


def _farthest_first(layer: Sequence[Candidate]) -> list[Candidate]:
    """The best first, then always the one that is farthest from all before it."""
    rest = sorted(layer, key=lambda one: (one.score.value, one.costs, one.number))
    place = _places(rest)
    found = [rest.pop(0)]
    while rest:
        far = max(rest, key=lambda one: min(math.dist(place[one.number], place[got.number]) for got in found))
        rest.remove(far)
        found.append(far)
    return found


def _places(layer: Sequence[Candidate]) -> Mapping[int, tuple[float, ...]]:
    """Every objective brought to 0..1; costs by their logarithm."""
    columns = [[one.score.value for one in layer]]
    for index in range(len(layer[0].costs)):
        columns.append([math.log(max(one.costs[index], 1e-12)) for one in layer])
    scaled = []
    for column in columns:
        low, width = min(column), (max(column) - min(column)) or 1.0
        scaled.append([(value - low) / width for value in column])
    return {one.number: tuple(column[row] for column in scaled) for row, one in enumerate(layer)}
