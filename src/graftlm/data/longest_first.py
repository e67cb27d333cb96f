"""Rows of like length together, the longest first, so that memory peaks at the start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def longest_first(lengths: Sequence[int], *, tokens: int, rows: int | None = None) -> Iterator[list[int]]:
    """Places in `lengths`, in batches of at most `tokens` with their padding, and of at most `rows`.

    A row longer than that is a batch of its own. A pure function of the lengths: whoever measures the same
    rows again gets the same bits.

    >>> list(longest_first([2, 5, 2, 4], tokens=10))
    [[1, 3], [0, 2]]
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if batch and (len(batch) == rows or lengths[batch[0]] * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
