"""Whole rows into windows of a fixed number of tokens: best fit, longest first."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Windows of row indices; every row of `order` is in exactly one, none holds more than `capacity`.

    Rows are placed longest first, each into the window with the least room that still takes it
    (best-fit decreasing: at most 11/9 of the fewest windows possible, plus one; in practice within a few
    per cent). Rows of equal length are taken as `order` has them, so that windows differ between
    epochs, while their *number* depends on the lengths alone.

    Johnson, "Near-optimal bin packing algorithms", 1973; Ding et al., "Fewer Truncations Improve
    Language Modeling", arXiv:2404.10830.

    >>> best_fit([5, 3, 4, 2], order=[0, 1, 2, 3], capacity=7)
    [[0, 3], [2, 1]]
    """
    open_with: dict[int, list[int]] = {}  # room left -> windows with that room
    rooms = 0  # bit n is set: some window has room n
    windows: list[list[int]] = []
    for row in sorted(order, key=lambda row: -lengths[row]):
        need = lengths[row]
        if need > capacity:
            raise ValueError(f"row {row} has {need} tokens, a window holds {capacity}")
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            window = open_with[room].pop()
            if not open_with[room]:
                rooms &= ~(1 << room)
        else:
            room = capacity
            window = len(windows)
            windows.append([])
        windows[window].append(row)
        left = room - need
        if left:
            open_with.setdefault(left, []).append(window)
            rooms |= 1 << left
    return windows
