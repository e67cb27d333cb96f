"""Measures in words: one form for verdicts, the command line and reports."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.evaluation.measure_change import MeasureChange, measure_of
from graftlm.evaluation.measures import Unit
from graftlm.evaluation.runner import Evaluation


def shown(value: float, unit: Unit) -> str:
    """A value with its unit.

    >>> shown(0.931, "share"), shown(0.0123, "nats"), shown(12.0, "tokens"), shown(1.23456, "plain")
    ('93.1 %', '0.0123 nats', '12.0 tokens', '1.235')
    """
    match unit:
        case "share":
            return f"{100 * value:.1f} %"
        case "nats":
            return f"{_digits(value)} nats"
        case "tokens":
            return f"{value:.1f} tokens"
        case "points":
            return f"{value:.1f}"
        case _:
            return _digits(value)


def shown_difference(value: float, unit: Unit) -> str:
    """A difference, signed; that of a share is in percentage points.

    >>> shown_difference(0.031, "share"), shown_difference(-0.5, "plain")
    ('+3.1 points', '-0.5')
    """
    if unit == "share":
        return f"{100 * value:+.1f} points"
    return shown(value, unit) if value < 0 else f"+{shown(value, unit)}"


def range_of(change: MeasureChange) -> str:
    """The 95 % interval of a difference; the unit stands once.

    >>> from graftlm.evaluation.metrics import Interval
    >>> one = Interval(0.1, 0.05, 0.15)
    >>> range_of(MeasureChange("accuracy", "Accuracy", "share", "higher", one, one, one, 40))
    '+5.0 to +15.0'
    """
    ends = (shown_difference(end, change.unit) for end in (change.difference.low, change.difference.high))
    return " to ".join(end.split(" ")[0] for end in ends)


def sentence(change: MeasureChange) -> str:
    """Before, after, difference and its interval."""
    before, after = (shown(one.value, change.unit) for one in (change.before, change.after))
    difference = shown_difference(change.difference.value, change.unit)
    return f"{change.title} {before} -> {after} ({difference}, 95 % interval {range_of(change)})"


def brief(changes: Sequence[MeasureChange]) -> str:
    """Several measures, values only."""
    return ", ".join(
        f"{change.title} {shown(change.before.value, change.unit)} -> "
        f"{shown(change.after.value, change.unit)}"
        for change in changes
    )


def headline(*evaluations: Evaluation) -> str:
    """The one figure of one or more evaluations: what the task is judged by, or the loss.

    >>> from graftlm.evaluation.runner import EvaluatedRow
    >>> one = Evaluation("base", (EvaluatedRow(1, "", 2.0, 1),), 0.0, True, "")
    >>> headline(one, one)
    'held-out loss 2.000 to 2.000'
    """
    for name in evaluations[0].measures:
        measure = measure_of(name)
        rows = [[row for row in each.rows if measure.covers(row)] for each in evaluations]
        if all(rows):
            values = (shown(measure.value(part), measure.unit) for part in rows)
            return f"{measure.title} {' to '.join(values)}"
    return f"held-out loss {' to '.join(f'{each.loss:.3f}' for each in evaluations)}"


def _digits(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 0.1 else f"{value:.3g}"
