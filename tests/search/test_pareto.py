"""Fronts against their definition, spelled out over all pairs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graftlm.search.pareto import Candidate, front, knee, layers, smallest_equal
from graftlm.search.scores import Score, is_better, is_equal, noise

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def made(points: list[tuple[int, int, int]]) -> list[Candidate]:
    """Costs far enough apart that none counts as the same."""
    return [
        Candidate(number, Score(float(value)), (2.0**one, 2.0**other))
        for number, (value, one, other) in enumerate(points)
    ]


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int, int]]) -> None:
    def beaten(one: tuple[int, int, int]) -> bool:
        return any(all(a <= b for a, b in zip(other, one, strict=True)) and other != one for other in points)

    kept = {one.number for one in front(made(points))}
    assert kept == {number for number, point in enumerate(points) if not beaten(point)}


@given(POINTS)
def test_layers_hold_every_trial_once_and_the_first_without_noise_holds_the_front(
    points: list[tuple[int, int, int]],
) -> None:
    candidates = made(points)
    found = layers(candidates)
    assert sorted(one.number for layer in found for one in layer) == list(range(len(points)))
    assert {one.number for one in front(candidates)} <= {one.number for one in found[0]}


def test_noise_is_that_of_paired_rows() -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(2.0, 1.0, 400)
    picks = generator.integers(400, size=(200, 400))
    better = rows - 0.05 + generator.normal(0.0, 0.1, 400)

    def score(values: np.ndarray) -> Score:
        return Score(float(values.mean()), tuple(values[picks].mean(axis=1)))

    one, other = score(better), score(rows)
    assert is_better(one, other)
    assert noise(one, other) < 0.5 * one.error, "each value alone is far less sure than the difference"
    assert abs(noise(one, other) - 1.96 * (better - rows).std() / 20) < 0.003


def test_who_is_not_told_apart_is_equal_and_the_cheapest_is_taken() -> None:
    wide = (0.0, 1.0)
    best = Candidate(0, Score(1.00, wide), (100.0,))
    near = Candidate(1, Score(1.01, (1.0, 0.0)), (10.0,))
    far = Candidate(2, Score(9.00, wide), (1.0,))
    assert is_equal(best.score, near.score)
    assert smallest_equal([best, near, far]) is near


def test_the_knee_is_where_quality_begins_to_cost() -> None:
    points = [
        Candidate(number, Score(value), (cost,))
        for number, (value, cost) in enumerate([(3.0, 1.0), (1.1, 10.0), (1.0, 100.0), (0.9, 1000.0)])
    ]
    found = knee(points)
    assert found is not None and found.number == 1
    assert knee(points[:2]) is None
    line = [Candidate(n, Score(3.0 - n), (10.0**n,)) for n in range(4)]
    assert knee(line) is None, "a straight line has no bend"
