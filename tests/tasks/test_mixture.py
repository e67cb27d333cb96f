"""Whose each step is: pure in (seed, epoch, index), every source in its own order, shares as asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.data.batches import Batch, Batches
from graftlm.data.encode import Encoded
from graftlm.tasks.mixture import Mixture, shares


def source(rows: int, *, seed: int = 3, per_batch: int = 2) -> Batches:
    encoded = [Encoded((5, 6, row % 7), (-100, 6, row % 7), row, False) for row in range(1, rows + 1)]
    return Batches(encoded, rows_per_batch=per_batch, max_length=8, packing=False, seed=seed, pad_token_id=0)


def mixture(sizes: dict[str, int], *, window: int = 1, power: float = 1.0, seed: int = 3) -> Mixture:
    return Mixture({name: source(n) for name, n in sizes.items()}, window=window, power=power, seed=seed)


SIZES = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 40), min_size=2)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, window=st.integers(1, 4), power=st.sampled_from([0.0, 0.5, 1.0]), epoch=st.integers(0, 3))
def test_each_step_belongs_to_one_task(sizes: dict[str, int], window: int, power: float, epoch: int) -> None:
    mixed = mixture(sizes, window=window, power=power)
    names = [mixed.batch(epoch, index).part for index in range(mixed.count(epoch))]
    steps = [set(names[start : start + window]) for start in range(0, len(names), window)]
    assert all(len(step) == 1 for step in steps)
    assert Counter(step.pop() for step in steps) == mixed.steps
    assert set(mixed.steps) == set(sizes), "no task is left out"
    firsts = [mixed.batch(e, index).part for e in range(2) for index in range(0, mixed.count(e), window)]
    some = len(firsts) * 2 // 3
    assert mixed.taken(some) == {name: firsts[:some].count(name) for name in sizes}


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, window=st.integers(1, 3), power=st.sampled_from([0.0, 1.0]))
def test_a_task_takes_its_own_batches_in_its_own_order(
    sizes: dict[str, int], window: int, power: float
) -> None:
    """Epoch after epoch, whatever the others do: as in a run of its own."""
    mixed = mixture(sizes, window=window, power=power)
    taken: dict[str, list[Batch]] = {name: [] for name in sizes}
    for epoch in range(3):
        for index in range(mixed.count(epoch)):
            batch = mixed.batch(epoch, index)
            taken[batch.part].append(batch)
    for name, found in taken.items():
        own = source(sizes[name])
        alone = [own.batch(e, i) for e in range(1 + 3 * len(found)) for i in range(own.count(e))]
        assert [batch.rows for batch in found] == [batch.rows for batch in alone[: len(found)]]


def test_order_is_a_pure_function() -> None:
    one, other = mixture({"a": 20, "b": 30}), mixture({"a": 20, "b": 30})
    places = [(epoch, index) for epoch in range(3) for index in range(one.count(epoch))]
    backwards = {place: other.batch(*place) for place in reversed(places)}
    for place in places:
        found = one.batch(*place)
        assert (found.part, found.rows) == (backwards[place].part, backwards[place].rows)
    assert one.fingerprint == other.fingerprint
    first, second = ([one.batch(e, i).part for i in range(one.count(e))] for e in (0, 1))
    assert first != second, "the order differs from epoch to epoch"


@pytest.mark.parametrize("change", [{"seed": 4}, {"power": 0.5}, {"window": 2}])
def test_fingerprint_tells_what_decides_the_order(change: dict[str, int]) -> None:
    sizes = {"a": 20, "b": 30}
    assert mixture(sizes, **change).fingerprint != mixture(sizes).fingerprint  # type: ignore[arg-type]


@given(counts=st.dictionaries(st.text(min_size=1), st.integers(1, 10_000), min_size=1), power=st.floats(0, 1))
def test_shares(counts: dict[str, int], power: float) -> None:
    found = shares(counts, power)
    assert all(share >= 1 for share in found.values())
    total = sum(counts.values())
    assert total <= sum(found.values()) <= total + len(counts)
    whole = sum(count**power for count in counts.values())
    for name, count in counts.items():
        assert abs(found[name] - total * count**power / whole) <= 1.5 or found[name] == 1
