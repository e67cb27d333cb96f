"""The trials that no other beats in everything: the front, its knee, and the smallest that is as good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graftlm.search.scores import Score, best, is_better, is_equal

SAME_COST = 0.02
"""Costs closer than this share are taken for equal: memory and seconds are measured."""


@dataclass(frozen=True)
class Candidate:
    """One trial as the front sees it: what it is worth, and what it costs (each the lower the better)."""

    number: int
    score: Score
    costs: tuple[float, ...] = ()


def is_cheaper(one: Candidate, other: Candidate) -> bool:
    """No cost is higher, and one is lower."""
    pairs = list(zip(one.costs, other.costs, strict=True))
    no_higher = all(mine <= theirs * (1 + SAME_COST) for mine, theirs in pairs)
    return no_higher and any(mine * (1 + SAME_COST) < theirs for mine, theirs in pairs)


def dominates(one: Candidate, other: Candidate) -> bool:
    """At least as good and as cheap in everything, and more than that in something."""
    pairs = zip(one.costs, other.costs, strict=True)
    no_dearer = all(mine <= theirs * (1 + SAME_COST) for mine, theirs in pairs)
    if not no_dearer or one.score.value > other.score.value:
        return False
    return one.score.value < other.score.value or is_cheaper(one, other)


def clearly_dominates(one: Candidate, other: Candidate) -> bool:
    """As cheap in everything, and better by more than the noise of the rows."""
    pairs = zip(one.costs, other.costs, strict=True)
    return all(mine <= theirs * (1 + SAME_COST) for mine, theirs in pairs) and is_better(
        one.score, other.score
    )


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other dominates, the best score first."""
    kept = [one for one in candidates if not any(dominates(other, one) for other in candidates)]
    return sorted(kept, key=lambda one: (one.score.value, one.costs, one.number))


def layers(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Non-domination ranks beyond noise (Deb et al. 2002): the front, the front of the rest, and so on."""
    rest, found = list(candidates), list[list[Candidate]]()
    while rest:
        layer = [one for one in rest if not any(clearly_dominates(other, one) for other in rest)]
        layer = layer or rest  # noise is not transitive: a cycle is one layer
        found.append(layer)
        rest = [one for one in rest if one not in layer]
    return found


def knee(points: Sequence[Candidate]) -> Candidate | None:
    """The point of a front that lies farthest below the line between its ends: from there on, quality costs.

    The first cost counts, on a log scale. None where the front has fewer than three points, or no bend.
    """
    ordered = sorted((one for one in points if one.costs), key=lambda one: one.costs[0])
    if len(ordered) < 3:
        return None
    first, last = ordered[0], ordered[-1]
    width = _log(last.costs[0]) - _log(first.costs[0])
    height = first.score.value - last.score.value
    if width <= 0 or height <= 0:
        return None

    def below(one: Candidate) -> float:
        x = (_log(one.costs[0]) - _log(first.costs[0])) / width
        return (1 - x) - (one.score.value - last.score.value) / height

    found = max(ordered[1:-1], key=below)
    return found if below(found) > 0 else None


def smallest_equal(candidates: Sequence[Candidate]) -> Candidate:
    """Of those that rows do not tell from the best, the cheapest; the best of equally cheap ones.

    The one to take unless something speaks for another: what is within noise is no reason to pay.
    """
    leader = candidates[best([one.score for one in candidates])]
    equal = [one for one in candidates if is_equal(one.score, leader.score)]
    return min(equal, key=lambda one: (one.costs, one.score.value, one.number))


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))
