"""Scores of told labels: macro-F1, Matthews correlation, micro-F1, F1 of spans, correlations of numbers.

All are functions of evaluated rows, by their figures. Where a score divides by nothing (no row was told to be
of a class, all numbers are equal) the part that is not defined counts as 0, as in scikit-learn and seqeval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graftlm.evaluation.metrics import Floats
from graftlm.evaluation.runner import EvaluatedRow

Rows = Sequence[EvaluatedRow]

LABELS = ("predicted", "actual")
"""Figures of a row with one label: the number of the label."""
VALUES = ("predicted_value", "actual_value")
"""Figures of a row with a number."""
HITS = ("hits", "told", "wanted")
"""Figures of a row with several labels, or with spans: how many were right, were told, and are there."""


def macro_f1(rows: Rows) -> float:
    """Mean over the classes that occur of the harmonic mean of precision and recall."""
    table = _confusion(rows)
    right, told, wanted = np.diag(table), table.sum(axis=0), table.sum(axis=1)
    occurs = told + wanted > 0
    return float(np.mean(2 * right[occurs] / (told + wanted)[occurs]))


def matthews(rows: Rows) -> float:
    """Matthews' correlation coefficient of several classes (Gorodkin 2004)."""
    table = _confusion(rows)
    told, wanted, count = table.sum(axis=0), table.sum(axis=1), table.sum()
    covariance = np.trace(table) * count - told @ wanted
    spread = (count**2 - told @ told) * (count**2 - wanted @ wanted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def micro_f1(rows: Rows) -> float:
    """2 x right / (told + there), over all rows: of several labels, and of spans."""
    hits, told, wanted = (column.sum() for column in _columns(rows, HITS))
    return float(2 * hits / (told + wanted)) if told + wanted else 0.0


def pearson(rows: Rows) -> float:
    """Linear correlation of the numbers that were told with the right ones."""
    return _correlation(*_columns(rows, VALUES))


def spearman(rows: Rows) -> float:
    """Correlation of the ranks; equal numbers share the mean of their ranks."""
    told, actual = _columns(rows, VALUES)
    return _correlation(_ranks(told), _ranks(actual))


def squared_error(rows: Rows) -> float:
    """Mean squared difference of the numbers."""
    told, actual = _columns(rows, VALUES)
    return float(np.mean((told - actual) ** 2))


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Named spans (name, first word, word behind the last) in tags such as B-PER, I-PER, O; of tags without
    such a prefix every word is a span of its own. A span that begins with I counts, as in conlleval.

    >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    found: set[tuple[str, int, int]] = set()
    name, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        is_span = prefix in ("B", "I", "E", "S", "L", "U") and bool(kind)
        goes_on = is_span and prefix in ("I", "E", "L") and kind == name
        if name and not goes_on:
            found.add((name, start, place))
            name = ""
        if is_span and not goes_on:
            name, start = kind, place
            if prefix in ("S", "U"):
                found.add((name, start, place + 1))
                name = ""
        elif not is_span and tag != "O":
            found.add((tag, place, place + 1))
    return found


def _columns(rows: Rows, names: Sequence[str]) -> list[Floats]:
    return [np.array([row.figures[name] for row in rows], dtype=np.float64) for name in names]


def _confusion(rows: Rows) -> Floats:
    """[actual, predicted] counts."""
    told, actual = (column.astype(np.int64) for column in _columns(rows, LABELS))
    size = int(max(told.max(), actual.max())) + 1
    counts = np.bincount(actual * size + told, minlength=size * size)
    return counts.reshape(size, size).astype(np.float64)


def _correlation(one: Floats, other: Floats) -> float:
    a, b = one - one.mean(), other - other.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else 0.0


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = (ends - (counts - 1) / 2)[place]
    return means
