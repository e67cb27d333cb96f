"""The hold-out: sizes, determinism, and no row on both sides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core.errors import DataError
from graftlm.data.duplicates import alike, as_ranges, find_duplicates
from graftlm.data.records import Example, Turn
from graftlm.data.split import split


def rows_of(texts: list[str]) -> list[Example]:
    return [
        Example((Turn("user", text, False), Turn("assistant", "Yes.", True)), row=row)
        for row, text in enumerate(texts, start=1)
    ]


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="aB c", max_size=4), max_size=120),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 3),
)
def test_split(texts: list[str], fraction: float, seed: int) -> None:
    examples = rows_of(texts)
    train, held_out = split(examples, fraction, seed)
    assert sorted([*train, *held_out], key=lambda one: one.row) == examples
    assert not {one.key for one in train} & {one.key for one in held_out}
    assert len(held_out) <= len(examples) // 2
    assert (train, held_out) == split(examples, fraction, seed)
    assert [one.row for one in held_out] == sorted(one.row for one in held_out)


@pytest.mark.parametrize(("count", "wanted"), [(1000, 100), (200, 30), (40, 20), (1, 0)])
def test_sizes_of_the_hold_out(count: int, wanted: int) -> None:
    examples = rows_of([f"number {n}" for n in range(count)])
    assert len(split(examples, 0.1, seed=42)[1]) == wanted
    assert split(examples, 0.0, seed=42) == (examples, [])
    with pytest.raises(DataError, match="fraction"):
        split(examples, 1.0, seed=42)


def test_the_seed_chooses_other_rows() -> None:
    examples = rows_of([f"number {n}" for n in range(200)])
    assert split(examples, 0.1, seed=1)[1] != split(examples, 0.1, seed=2)[1]


LONG = "the quick brown fox jumps over the lazy dog and then runs far away into the deep dark green forest"


def test_near_duplicates_are_found_and_stay_together() -> None:
    texts = [
        f"{LONG} {LONG[::-1]} number {n}" if n in (3, 90) else f"question {n} about {n * n}"
        for n in range(100)
    ]
    examples = rows_of(texts)
    assert find_duplicates(examples).near == ((91, 4),)
    assert [3, 90] in alike(examples)
    for seed in range(5):
        train, held_out = split(examples, 0.3, seed)
        assert not find_duplicates(train, held_out).leaked


def test_duplicates_contradictions_and_leaks() -> None:
    one = Example((Turn("user", "One?", False), Turn("assistant", "1", True)), row=1)
    again = Example(one.turns, row=2)
    other = Example((Turn("user", "one?", False), Turn("assistant", "2", True)), row=3)
    found = find_duplicates([one, again, other], [Example(one.turns, row=8)])
    assert found.exact == ((2, 1), (8, 1))
    assert found.contradictions == ((3, 1),)
    assert found.leaked == ((8, 1),)
    assert find_duplicates([]).exact == ()


def test_near_duplicates_agree_with_the_exact_measure() -> None:
    words = LONG.split()
    texts = [" ".join(words[: 8 + n % 11]) + f" {'x' * (n % 3)}" for n in range(60)]
    found = dict(find_duplicates(rows_of(texts)).near)
    for row, earlier in found.items():
        one, other = (
            {tuple(text[i : i + 3]) for i in range(len(text))}
            for text in ((texts[n - 1] + " Yes").lower().split() for n in (row, earlier))
        )
        assert len(one & other) >= 0.8 * len(one | other)


def test_row_numbers_for_people() -> None:
    assert as_ranges([]) == ""
    assert as_ranges([5, 1, 2, 3]) == "1-3, 5"
    assert as_ranges(range(1, 100, 2), limit=2) == "1, 3, ..."
