"""Leaks and groups by sequences of 13 words, against a plain definition over sets of words."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.data.overlap import COMMON, LENGTH, MOSTLY, find_leaks, joined, passages
from graftlm.data.records import Example, Turn
from graftlm.data.split import split


def row(text: str, number: int) -> Example:
    return Example((Turn("text", text, True),), row=number)


def words(seed: int, count: int = 40) -> str:
    return " ".join(f"w{random.Random(seed * 1000 + n).randrange(10_000)}" for n in range(count))


def sequences(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.casefold())
    return {tuple(found[at : at + LENGTH]) for at in range(len(found) - LENGTH + 1)}


def leaked_by_definition(train: list[Example], held_out: list[Example]) -> list[int]:
    counts = Counter(sequence for one in train for sequence in sequences(one.text))
    found = []
    for place, one in enumerate(held_out):
        left = {sequence for sequence in sequences(one.text) if counts[sequence] <= COMMON}
        shared = {sequence for sequence in left if counts[sequence]}
        if any(one.key == other.key for other in train) or (left and len(shared) >= MOSTLY * len(left)):
            found.append(place)
    return found


texts = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=14)


@settings(deadline=None, max_examples=60)
@given(train=texts, held_out=texts)
def test_leaks_are_those_of_the_definition(train: list[list[int]], held_out: list[list[int]]) -> None:
    """Rows are made of few blocks of 20 words, so that they share some, and some often."""
    blocks = [words(seed, 20) for seed in range(6)]
    sides = [
        [row(" ".join(blocks[place] for place in one), number) for number, one in enumerate(side)]
        for side in (train, held_out)
    ]
    found = find_leaks(*sides)
    assert [place for place, _ in found.leaked] == leaked_by_definition(*sides)
    assert found.touched >= sum(not any(sides[1][p].key == t.key for t in sides[0]) for p, _ in found.leaked)


def test_what_all_rows_share_is_no_leak() -> None:
    instruction = words(1, 60)
    train = [row(f"{instruction} {words(n)}", n) for n in range(2, 30)]
    assert find_leaks(train, [row(f"{instruction} {words(99)}", 1)]) == find_leaks(train, [])


def test_the_training_row_is_named() -> None:
    train = [row(words(n), n) for n in range(20)]
    held_out = [row(words(50), 1), row(f"before {words(7)} and behind", 2), row("SHORT  row", 3)]
    assert find_leaks([*train, row("short row", 9)], held_out).leaked == ((1, 7), (2, 20))


@pytest.mark.parametrize("texts", [[], ["short"], ["short", "also short"]])
def test_nothing_to_compare(texts: list[str]) -> None:
    rows = [row(text, place) for place, text in enumerate(texts)]
    assert passages(rows) == []
    assert find_leaks(rows, []).leaked == find_leaks([], rows).leaked == ()


def test_groups() -> None:
    texts = [words(1), words(2), f"{words(1)} and more", f"{words(1, 15)} {words(3)}", words(2)]
    assert passages([row(text, place) for place, text in enumerate(texts)]) == [[0, 2], [1, 4]]
    assert joined(3, []) == []


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), repeats=st.integers(1, 4))
def test_a_split_by_passages_leaks_nothing(seed: int, repeats: int) -> None:
    chance = random.Random(seed)
    blocks = [words(n, 20) for n in range(40)]
    rows = [row(" ".join(chance.sample(blocks, repeats)) + f" end {number}", number) for number in range(90)]
    train, held_out = split(rows, 0.3, seed, together="passages")
    assert sorted(one.row for one in (*train, *held_out)) == list(range(90))
    assert not find_leaks(train, held_out).leaked


def test_a_split_of_rows_that_share_nothing_is_the_same() -> None:
    rows = [row(words(n), n) for n in range(100)]
    assert split(rows, 0.2, 3, together="passages") == split(rows, 0.2, 3)
