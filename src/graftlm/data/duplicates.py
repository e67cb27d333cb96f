"""Equal, nearly equal and contradictory rows, and rows of the hold-out that were trained on.

Near duplicates share at least 80 % of their three-word sequences. Candidates come from MinHash
signatures in bands (Broder 1997, "On the resemblance and containment of documents"), and every candidate
is verified on the real sets: what is reported is true, a few per cent of such pairs may be missed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from graftlm.data.records import Example, Record

if TYPE_CHECKING:
    from numpy import uint64
    from numpy.typing import NDArray

Pair = tuple[int, int]

_ALIKE = 0.8
_BANDS, _PER_BAND = 5, 3
_WORDS = 2_000  # of a row; more would cost time and hardly change the verdict
_COMPARED = 3  # earliest members of a bucket that a row is compared with
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Duplicates:
    """Pairs (row, earlier row) of row numbers.

    exact: the same text. near: almost the same. contradictions: the same prompt, another answer.
    leaked: (row of the hold-out, row of the training part), exact or near.
    """

    exact: tuple[Pair, ...]
    near: tuple[Pair, ...]
    contradictions: tuple[Pair, ...]
    leaked: tuple[Pair, ...]


def find_duplicates(train: Sequence[Example], held_out: Sequence[Example] = ()) -> Duplicates:
    """Compare all rows with each other in near-linear time.

    >>> from graftlm.data.records import Turn
    >>> row = Example((Turn("user", "One?", False), Turn("assistant", "Two.", True)), row=1)
    >>> found = find_duplicates([row], [Example(row.turns, row=7)])
    >>> found.exact, found.leaked
    (((7, 1),), ((7, 1),))
    """
    examples = [*train, *held_out]
    exact = _first_equal([tuple((turn.role, turn.text) for turn in example.turns) for example in examples])
    near = {
        index: first
        for index, first in _first_alike([one.text for one in examples]).items()
        if index not in exact
    }
    leaked = {
        index: first for index, first in (exact | near).items() if index >= len(train) and first < len(train)
    }

    def rows(found: dict[int, int]) -> tuple[Pair, ...]:
        return tuple((examples[index].row, examples[first].row) for index, first in sorted(found.items()))

    return Duplicates(rows(exact), rows(near), rows(_contradictions(examples)), rows(leaked))


def alike(examples: Sequence[Record]) -> list[list[int]]:
    """Indices of the examples in groups: equal and nearly equal ones together, first seen first."""
    leader = list(range(len(examples)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    equal = _first_equal([example.key for example in examples])
    near = _first_alike([example.text for example in examples])
    for index, first in [*equal.items(), *near.items()]:
        leader[find(index)] = find(first)
    groups: dict[int, list[int]] = {}
    for index in range(len(examples)):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())


def _first_equal(keys: Sequence[object]) -> dict[int, int]:
    first: dict[object, int] = {}
    found = {}
    for index, key in enumerate(keys):
        if first.setdefault(key, index) != index:
            found[index] = first[key]
    return found


def _contradictions(examples: Sequence[Example]) -> dict[int, int]:
    first: dict[str, tuple[int, str]] = {}
    found = {}
    for index, example in enumerate(examples):
        if example.style == "text":
            continue
        prompt, _, answer = example.key.rpartition("\x1eassistant\x1f")
        known, said = first.setdefault(prompt, (index, answer))
        if prompt and said != answer:
            found[index] = known
    return found


def _first_alike(texts: Sequence[str]) -> dict[int, int]:
    """Index of a text -> index of the earliest text found to be nearly the same."""
    shingles, starts = _shingles(texts)
    signatures = _signatures(shingles, starts)
    buckets: dict[bytes, list[int]] = {}
    sets: dict[int, frozenset[int]] = {}

    def members(index: int) -> frozenset[int]:
        if index not in sets:
            sets[index] = frozenset(shingles[starts[index] : starts[index + 1]].tolist())
        return sets[index]

    found: dict[int, int] = {}
    for index, signature in enumerate(signatures):
        candidates: set[int] = set()
        for band in range(_BANDS):
            key = signature[band * _PER_BAND : (band + 1) * _PER_BAND].tobytes() + bytes([band])
            bucket = buckets.setdefault(key, [])
            candidates.update(bucket)
            if len(bucket) < _COMPARED:
                bucket.append(index)
        for candidate in sorted(candidates):
            one, other = members(index), members(candidate)
            if len(one & other) >= _ALIKE * len(one | other):
                found[index] = candidate
                break
    return found


def _shingles(texts: Sequence[str]) -> tuple[NDArray[uint64], list[int]]:
    """Hashes of all three-word sequences of all texts, and where each text's hashes start."""
    import numpy as np

    known: dict[str, int] = {}
    words: list[int] = []
    starts = [0]
    for text in texts:
        for word in _WORD.findall(text.casefold())[:_WORDS] or [text]:
            if word not in known:
                known[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
            words.append(known[word])
        starts.append(len(words))
    first = np.array(words, dtype=np.uint64)
    second, third = np.zeros_like(first), np.zeros_like(first)
    second[:-1], third[:-2] = first[1:], first[2:]
    ends = np.array(starts[1:], dtype=np.int64)
    second[ends - 1] = 0  # sequences stop at the end of their text
    third[ends - 1] = 0
    third[np.maximum(ends - 2, 0)] = 0
    mixed = first * np.uint64(0x9E3779B97F4A7C15) + second * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed += third * np.uint64(0x165667B19E3779F9)
    return mixed ^ (mixed >> np.uint64(29)), starts


def _signatures(shingles: NDArray[uint64], starts: list[int]) -> NDArray[uint64]:
    """[texts, bands x per band] smallest hash under each of the random orders."""
    import numpy as np

    factors = np.random.default_rng(0).integers(1, 2**63, size=_BANDS * _PER_BAND, dtype=np.uint64)
    if len(starts) == 1:
        return np.empty((0, len(factors)), dtype=np.uint64)
    columns = []
    for factor in factors:
        order = (shingles * (factor | np.uint64(1))) >> np.uint64(16)
        columns.append(np.minimum.reduceat(order, starts[:-1]))
    return np.stack(columns, axis=1)


def as_ranges(rows: Sequence[int], limit: int = 8) -> str:
    """Row numbers for people.

    >>> as_ranges([3, 4, 5, 9])
    '3-5, 9'
    """
    ordered = sorted(set(rows))
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(ordered), start=1) if b != a + 1), len(ordered)]
    spans = [(ordered[a], ordered[b - 1]) for a, b in pairwise(cuts) if a < b]
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in spans[:limit]]
    return ", ".join([*shown, "..."] if len(spans) > limit else shown)
