"""Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def markdown(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table.

    >>> print(markdown(("side", "tokens/s"), [("ours", 12)]))
    | side | tokens/s |
    |---|---|
    | ours | 12 |
    """
    rows = [f"| {' | '.join(map(str, cells))} |" for cells in lines]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows])


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median with the range; a single value alone.

    >>> spread([2.0, 1.0, 4.0])
    '2.00 (1.00 to 4.00)'
    """
    middle, *ends = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({' to '.join(ends)})"
