"""A change that was measured, in the plain form of the facts."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.diagnosis.facts.behaviour import Change
from graftlm.evaluation.metrics import LossChange, paired_bootstrap


def change_of(loss: LossChange) -> Change:
    """The figures that rules compare."""
    span = loss.difference
    return Change(loss.before.value, loss.after.value, span.low, span.high, loss.rows)


def mean_change(before: Sequence[float], after: Sequence[float]) -> Change:
    """The same of values that are no losses, one for each item.

    >>> mean_change([1.0, 3.0], [2.0, 4.0]).difference
    1.0
    """
    return change_of(paired_bootstrap(before, after, [1] * len(before)))
