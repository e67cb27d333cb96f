"""Rows that stand in other rows, by sequences of 13 words: leaks, and the groups that prevent them.

Sequences of 13 words that two texts share are hardly ever chance, which is why contamination is told by them
since Brown et al. 2020 (arXiv 2005.14165, appendix C). As there, a sequence that many training rows have says
nothing: it belongs to an instruction or a template that all rows share. A row counts as leaked when half of
what is left of it stands in training rows. Shorter rows are compared whole. Languages without spaces between
words are therefore only compared whole.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftlm.data.records import Record

if TYPE_CHECKING:
    from numpy import uint64
    from numpy.typing import NDArray

LENGTH = 13
COMMON = 10
"""A sequence in more training rows than these is no evidence."""
MOSTLY = 0.5
_WORDS = 2_000  # of a row; more would cost time and hardly change the verdict
_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Leaks:
    """leaked: (index of the held-out row, of the training row). touched: held-out rows that share any
    sequence."""

    leaked: tuple[tuple[int, int], ...]
    touched: int


def find_leaks(train: Sequence[Record], held_out: Sequence[Record]) -> Leaks:
    """Compare all held-out rows with all training rows in near-linear time.

    >>> from graftlm.data.records import Example, Turn
    >>> def row(text, number): return Example((Turn("text", text, True),), row=number)
    >>> story = " ".join(f"word{n}" for n in range(30))
    >>> find_leaks([row(story, 1)], [row(story + " and an end of its own", 2), row("short", 3)])
    Leaks(leaked=((0, 0),), touched=1)
    """
    import numpy as np

    keys = {record.key: place for place, record in reversed(list(enumerate(train)))}
    hashes = [_sequences(record.text) for record in train]
    if not hashes:
        return Leaks((), 0)
    rows = np.repeat(np.arange(len(hashes)), [len(found) for found in hashes])
    distinct, first, counts = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
    leaked: list[tuple[int, int]] = []
    touched = 0
    for index, record in enumerate(held_out):
        own = _sequences(record.text)
        places = np.minimum(np.searchsorted(distinct, own), max(0, len(distinct) - 1))
        known = distinct[places] == own if len(distinct) else np.zeros(len(own), dtype=bool)
        is_common = known & (counts[places] > COMMON) if len(distinct) else known
        shared, left = known & ~is_common, ~is_common
        touched += bool(shared.any())
        if record.key in keys:
            leaked.append((index, keys[record.key]))
        elif left.any() and shared.sum() >= MOSTLY * left.sum():
            leaked.append((index, int(rows[first[places[shared][0]]])))
    return Leaks(tuple(leaked), touched)


def passages(records: Sequence[Record]) -> list[list[int]]:
    """Indices of the records in groups: those of which one stands in the other for at least half are
    together, first seen first. Only whole groups are given that have two members or more.

    >>> from graftlm.data.records import Example, Turn
    >>> def row(text, number): return Example((Turn("text", text, True),), row=number)
    >>> story = " ".join(f"word{n}" for n in range(30))
    >>> passages([row(story, 1), row("short", 2), row(story + " again", 3)])
    [[0, 2]]
    """
    import numpy as np

    hashes = [_sequences(record.text) for record in records]
    sizes = [len(found) for found in hashes]
    rows = np.repeat(np.arange(len(hashes), dtype=np.int64), sizes)
    if not len(rows):
        return []
    order = np.lexsort((rows, np.concatenate(hashes)))
    ordered, rows = np.concatenate(hashes)[order], rows[order]
    _, place, counts = np.unique(ordered, return_inverse=True, return_counts=True)
    is_rare = counts[place] <= COMMON
    ordered, rows = ordered[is_rare], rows[is_rare]
    left = np.bincount(rows, minlength=len(records))
    pairs = [
        rows[:-step][same] * len(records) + rows[step:][same]
        for step in range(1, min(COMMON, len(rows)))
        for same in [ordered[:-step] == ordered[step:]]
    ]
    found, shared = np.unique(np.concatenate([*pairs, rows[:0]]), return_counts=True)
    one, other = found // len(records), found % len(records)
    is_mostly = shared >= MOSTLY * np.minimum(left[one], left[other])
    return joined(len(records), zip(one[is_mostly].tolist(), other[is_mostly].tolist(), strict=True))


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of the indices below `count` that chains of pairs lead through.

    >>> joined(6, [(0, 2), (4, 2), (3, 5)])
    [[0, 2, 4], [3, 5]]
    """
    leader = list(range(count))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for one, other in pairs:
        first, second = sorted((find(one), find(other)))
        leader[second] = first
    groups: dict[int, list[int]] = {}
    for index in range(count):
        groups.setdefault(find(index), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _sequences(text: str) -> NDArray[uint64]:
    """Hashes of the distinct sequences of 13 words of a text."""
    import numpy as np

    words = _WORD.findall(text.casefold())[:_WORDS]
    numbers = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    count = len(numbers) - LENGTH + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    found = np.zeros(count, dtype=np.uint64)
    for place in range(LENGTH):
        found = found * np.uint64(_FACTOR) + numbers[place : place + count]
    return np.unique(found)
