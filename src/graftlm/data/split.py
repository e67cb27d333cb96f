"""A seeded hold-out in which equal rows never sit on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar

from graftlm.core.errors import DataError
from graftlm.data.duplicates import alike
from graftlm.data.overlap import find_leaks, joined, passages
from graftlm.data.records import Record

X = TypeVar("X", bound=Record)


Together = Literal["rows", "passages"]
"""What stays on one side: equal and nearly equal rows, or all rows that share a passage as well."""


def split(
    examples: Sequence[X], fraction: float, seed: int, minimum: int = 30, together: Together = "rows"
) -> tuple[list[X], list[X]]:
    """Part `examples` into (train, held out), both in their old order.

    Held out are `fraction` of the rows but at least `minimum`, and never more than half. Rows that are
    equal up to case and spacing, and near duplicates as far as they are found (see `duplicates`), go to the
    same side, so that nothing that was trained on is evaluated on; the hold-out is therefore
    smaller than asked if equal rows are many. With `together="passages"` no held-out row is left of which
    half stands in training rows, as far as sequences of 13 words tell (see `overlap`): the same text behind
    another question, or the same answer to a question in other words.

    Raises:
        DataError: `fraction` is not within [0, 1).

    >>> from graftlm.data.records import Example, Turn
    >>> rows = [Example((Turn("text", f"story {n}", True),), row=n) for n in range(100)]
    >>> train, held_out = split(rows, fraction=0.1, seed=1)
    >>> len(train), len(held_out)
    (70, 30)
    """
    if not 0 <= fraction < 1:
        raise DataError(
            f"The hold-out fraction is {fraction}.",
            meaning="It is the part of the rows kept for evaluation.",
            fix="Use a number from 0 (no hold-out) to below 1, such as 0.1.",
        )
    if fraction == 0:
        return list(examples), []
    wanted = min(max(round(len(examples) * fraction), minimum), len(examples) // 2)
    groups = alike(examples)
    if together == "passages":
        groups = _with_passages(groups, examples)
    held: set[int] = set()
    for group in sorted(groups, key=lambda group: _rank(examples[group[0]].key, seed)):
        if len(held) + len(group) <= wanted:
            held.update(group)
        if len(held) == wanted:
            break
    if together == "passages":
        held -= _leaking(held, examples)
    train = [example for index, example in enumerate(examples) if index not in held]
    return train, [examples[index] for index in sorted(held)]


def _with_passages(groups: list[list[int]], examples: Sequence[Record]) -> list[list[int]]:
    """Groups of equal rows joined where they share passages."""
    pairs = [(group[0], other) for group in (*groups, *passages(examples)) for other in group[1:]]
    several = joined(len(examples), pairs)
    inside = {index for group in several for index in group}
    return sorted([*several, *([index] for index in range(len(examples)) if index not in inside)])


def _leaking(held: set[int], examples: Sequence[Record]) -> set[int]:
    """Held-out indices that go back to the training side: half of each stands there, in rows of several
    groups. Each that goes back is one more to stand in."""
    back: set[int] = set()
    while True:
        stay = sorted(held - back)
        train = [example for index, example in enumerate(examples) if index not in held or index in back]
        leaked = find_leaks(train, [examples[index] for index in stay]).leaked
        if not leaked:
            return back
        back |= {stay[place] for place, _ in leaked}


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\x1d{key}".encode()).digest()
