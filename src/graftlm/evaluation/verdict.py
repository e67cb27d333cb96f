"""The one line that says whether a run did what it was for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftlm.evaluation.compare import Comparison, Forgetting, ShareChange
from graftlm.evaluation.measure_change import MeasureChange
from graftlm.evaluation.measure_text import brief, sentence
from graftlm.evaluation.metrics import Interval

Outcome = Literal["PASS", "FAIL", "INSUFFICIENT"]

MINIMUM_ROWS = 10
"""With fewer rows no interval is trusted."""
SAME = 0.01
"""Losses within 1 % of each other count as the same."""
TOLD = 2
"""Measures that the sentence gives besides the one that judges."""
SIGNIFICANT = 0.05
MUCH = 0.25
"""A rise of the loss on known text by more than a quarter is called much."""


@dataclass(frozen=True)
class Verdict:
    """`outcome` and the sentence that gives its reasons, figures included.

    PASS: better on held-out rows, and known text (if measured) within the margin. FAIL: no better, worse,
    or more forgotten than the margin allows. INSUFFICIENT: too few rows to say; the sentence says how
    many are needed.
    """

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class _Part:
    outcome: Outcome
    figures: str
    words: str


def verdict(
    comparison: Comparison, known: Forgetting | None = None, *, margin: float | None = None
) -> Verdict:
    """Judge a comparison; `margin` is how much the loss on known text may rise (0.10: by a tenth).

    None only tells it.

    Both parts are judged by their whole 95 % interval: better means the interval of the held-out
    difference lies below zero, forgotten means the interval of the relative rise lies above the margin.
    """
    task = _task(comparison)
    memory = _memory(known, margin) if known is not None else None
    parts = [task] if memory is None else [task, memory]
    outcomes = {part.outcome for part in parts}
    outcome: Outcome = (
        "FAIL" if "FAIL" in outcomes else "INSUFFICIENT" if "INSUFFICIENT" in outcomes else "PASS"
    )
    figures = "; ".join(part.figures for part in parts)
    if memory is None:
        # A task with measures of its own need not write text, of which something could be forgotten.
        unmeasured = "" if comparison.measures else " Forgetting was not measured."
        return Verdict(outcome, f"{figures}: {task.words}.{unmeasured}")
    joined = f"{task.words}, {_joint(task, memory)} {memory.words}"
    return Verdict(outcome, f"{figures}: {joined}.")


def _joint(task: _Part, memory: _Part) -> str:
    agree = (task.outcome == "PASS") == (memory.outcome == "PASS")
    return "and" if agree or task.outcome == "INSUFFICIENT" else "but"


def _task(comparison: Comparison) -> _Part:
    first = comparison.measures[0] if comparison.measures else None
    if first is not None and first.better != "neither":
        return _measured(first, comparison.measures[1:])
    return _loss(comparison)


def _measured(first: MeasureChange, others: Sequence[MeasureChange]) -> _Part:
    """Judged by the task's first measure; the next ones are told."""
    figures = ", ".join(filter(None, (sentence(first), brief(others[:TOLD]))))
    if first.rows < MINIMUM_ROWS:
        return _few(figures, first.rows)
    low, high = first.difference.low, first.difference.high
    low, high = (low, high) if first.better == "higher" else (-high, -low)
    if high < 0:
        return _Part("FAIL", figures, "worse")
    if low > 0:
        return _Part("PASS", figures, "better")
    scale = 1.0 if first.unit == "share" else max(abs(first.before.value), abs(first.after.value))
    if max(-low, high) <= SAME * scale:
        return _Part("FAIL", figures, "no better")
    needed = _needed(first.rows, first.difference, 0.0)
    return _Part("INSUFFICIENT", figures, f"no clear difference{needed}")


def _few(figures: str, rows: int) -> _Part:
    return _Part("INSUFFICIENT", figures, f"{rows} rows are too few to judge (at least {MINIMUM_ROWS})")


def _loss(comparison: Comparison) -> _Part:
    loss = comparison.loss
    difference = loss.difference
    figures = (
        f"Held-out loss {loss.before.value:.2f} -> {loss.after.value:.2f} "
        f"({difference.value:+.2f}, 95 % interval {difference.low:+.2f} to {difference.high:+.2f})"
    )
    match = comparison.exact_match
    if match is not None:
        figures += (
            f", exact match {_percent(match.before.interval.value)} -> {_percent(match.after.interval.value)}"
        )
    if loss.rows < MINIMUM_ROWS:
        return _few(figures, loss.rows)
    if difference.low > 0:
        return _Part("FAIL", figures, "worse")
    if match is not None and match.lost > match.gained and match.p_value < SIGNIFICANT:
        return _Part("FAIL", figures, f"worse answers ({_rows(match)})")
    if difference.high < 0:
        return _Part("PASS", figures, "better")
    if max(abs(loss.relative.low), abs(loss.relative.high)) < SAME:
        return _Part("FAIL", figures, "no better")
    return _Part("INSUFFICIENT", figures, f"no clear difference{_needed(loss.rows, difference, 0.0)}")


def _memory(known: Forgetting, margin: float | None) -> _Part:
    loss = known.loss
    rise = loss.relative
    figures = f"known text {rise.value * 100:+.1f} %"
    if margin is None:
        return _Part("PASS", figures, _forgotten(rise))
    allowed = f"margin {margin * 100:g} %"
    if loss.rows < MINIMUM_ROWS:
        return _Part("INSUFFICIENT", figures, f"{loss.rows} rows of known text are too few to judge")
    if rise.low > margin:
        return _Part("FAIL", figures, f"too much forgotten ({allowed})")
    if rise.high > margin:
        words = f"forgetting is unclear ({_range(rise)}, {allowed}){_needed(loss.rows, rise, margin)}"
        return _Part("INSUFFICIENT", figures, words)
    if rise.low > 0:
        return _Part("PASS", figures, f"little forgotten ({allowed})")
    return _Part("PASS", figures, "nothing forgotten beyond noise")


def _forgotten(rise: Interval) -> str:
    """How much is lost, where nobody set a margin to judge it by."""
    if rise.low <= 0:
        return "nothing forgotten beyond noise"
    if rise.value < SAME:
        return "hardly anything forgotten"
    amount = "much" if rise.value > MUCH else "some"
    return f"{amount} of what the base knew is forgotten while the adapter is on"


def _needed(measured: int, interval: Interval, bound: float) -> str:
    """How many rows would settle it if the value stayed: the half width shrinks with the root of the rows."""
    half = (interval.high - interval.low) / 2
    distance = abs(interval.value - bound)
    if half <= 0 or distance <= half / 30:
        return ""
    rows = math.ceil(measured * (half / distance) ** 2 * 1.1 / 10) * 10
    return f" (about {rows:,} rows would show one this size)" if rows > measured else ""


def _rows(match: ShareChange) -> str:
    return f"{match.gained} gained, {match.lost} lost, p = {match.p_value:.2g}"


def _range(interval: Interval) -> str:
    return f"{interval.low * 100:+.1f} to {interval.high * 100:+.1f} %"


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"
