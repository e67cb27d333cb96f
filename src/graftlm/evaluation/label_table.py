"""Which labels are found and which are taken for another, before and after on the same rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from graftlm.evaluation.runner import EvaluatedRow, Evaluation

MOST_CONFUSED = 12
"""Pairs of labels that are told."""


@dataclass(frozen=True)
class LabelLine:
    """One label: its rows, and how many of them are found. `predicted`: rows that the adapter gives it."""

    label: str
    rows: int
    found_before: int
    found_after: int
    predicted: int


@dataclass(frozen=True)
class Confusion:
    """`rows` with this label that the adapter takes for another."""

    label: str
    taken_for: str
    rows: int


@dataclass(frozen=True)
class LabelTable:
    """Every label in its order, and the pairs that are confused most often."""

    lines: tuple[LabelLine, ...]
    confused: tuple[Confusion, ...]


def label_table(before: Evaluation, after: Evaluation) -> LabelTable | None:
    """Of rows whose reference is one label; None where the task has no labels or no such row."""
    labels = after.labels
    pairs = [
        (old, new)
        for old, new in zip(before.rows, after.rows, strict=True)
        if new.reference in labels and old.prediction is not None and new.prediction is not None
    ]
    if not pairs:
        return None
    predicted = Counter(new.prediction for _, new in pairs)
    lines = tuple(_line(label, pairs, predicted[label]) for label in labels)
    wrong = Counter((new.reference, new.prediction) for _, new in pairs if new.prediction != new.reference)
    confused = tuple(
        Confusion(str(label), str(other), rows) for (label, other), rows in wrong.most_common(MOST_CONFUSED)
    )
    return LabelTable(lines, confused)


def _line(label: str, pairs: list[tuple[EvaluatedRow, EvaluatedRow]], predicted: int) -> LabelLine:
    mine = [(old, new) for old, new in pairs if new.reference == label]
    return LabelLine(
        label=label,
        rows=len(mine),
        found_before=sum(old.prediction == label for old, _ in mine),
        found_after=sum(new.prediction == label for _, new in mine),
        predicted=predicted,
    )
