"""What a search is judged by: the loss, exact match, or any measure that the task has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graftlm.core.config import suggest
from graftlm.core.errors import DataError, UsageError
from graftlm.evaluation.compare import compare
from graftlm.evaluation.measure_change import measure_of
from graftlm.evaluation.measure_text import shown, shown_difference
from graftlm.evaluation.measures import MEASURES, MeanOf, Unit
from graftlm.evaluation.metrics import Interval
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.search.scores import Score, noise

AUTO, LOSS, EXACT = "auto", "loss", "exact_match"
DRAWS = 200
"""Resamplings of the rows that noise is told from, the same for every trial."""

Rows = Sequence[EvaluatedRow]


@dataclass(frozen=True)
class Change:
    """A figure before and after on the same rows; the difference is after - before."""

    before: Interval
    after: Interval
    difference: Interval


@dataclass(frozen=True)
class Metric:
    """A figure of evaluated rows, and whether it should be high."""

    name: str
    title: str
    unit: Unit
    is_high: bool
    value: Callable[[Rows], float]
    covers: Callable[[EvaluatedRow], bool]

    def score(self, found: Evaluation) -> Score:
        """Of one trial; lower is better.

        Raises:
            DataError: no row has the figure, or it is not finite.
        """
        rows = [row for row in found.rows if self.covers(row)]
        value = self.value(rows) if rows else float("nan")
        if not np.isfinite(value):
            raise DataError(f"{self.title} is {value} on {len(rows)} of {len(found.rows)} rows.")
        sign = -1.0 if self.is_high else 1.0
        return Score(sign * value, tuple(float(sign * one) for one in self._drawn(rows)))

    def change(self, before: Evaluation, after: Evaluation) -> Change:
        """The figure of two models on the same rows, with intervals.

        Raises:
            DataError: they were measured on different rows.
        """
        found = compare(before, after)
        if self.name == LOSS:
            return Change(found.loss.before, found.loss.after, found.loss.difference)
        if self.name == EXACT:
            share = found.exact_match
            assert share is not None
            gain = (share.gained - share.lost) / share.after.rows
            half = noise(self.score(before), self.score(after))
            return Change(
                share.before.interval, share.after.interval, Interval(gain, gain - half, gain + half)
            )
        one = next(each for each in found.measures if each.name == self.name)
        return Change(one.before, one.after, one.difference)

    def shown(self, score: float) -> float:
        """The figure itself, from a score."""
        return -score if self.is_high else score

    def text(self, score: Score) -> str:
        """The figure with its unit."""
        return shown(self.shown(score.value), self.unit)

    def span(self, interval: Interval) -> str:
        """The ends of the interval of a difference; the unit stands once."""
        low, high = (shown_difference(end, self.unit) for end in (interval.low, interval.high))
        return f"{low.split(' ')[0]} to {high}"

    def _drawn(self, rows: Rows) -> Sequence[float]:
        generator = np.random.default_rng(len(rows))
        picked = generator.integers(len(rows), size=(DRAWS, len(rows)))
        if self.name == LOSS:
            sums, tokens = np.array([[row.loss_sum, row.tokens] for row in rows], float).T
            return list(sums[picked].sum(axis=1) / tokens[picked].sum(axis=1))
        if self.name == EXACT or isinstance(self.value, MeanOf):
            column = np.array([self.value([row]) for row in rows], float)
            return list(column[picked].mean(axis=1))
        drawn = [self.value([rows[index] for index in draw]) for draw in picked.tolist()]
        centre = self.value(rows)
        return [one if np.isfinite(one) else centre for one in drawn]


def require_known(name: str) -> None:
    """Refuse a metric of no task at all, before anything is loaded.

    Raises:
        UsageError: there is no such metric.
    """
    known = [AUTO, LOSS, EXACT, *MEASURES]
    if name not in known and "/" not in name:
        raise UsageError(
            f"There is no metric {name!r}{suggest(name, known)}.",
            meaning="A search is judged by the loss, or by a measure of its task.",
            fix=f"Choose one of {', '.join(known)}.",
        )


def metric_of(name: str, found: Evaluation) -> Metric:
    """The metric of a name on this task, told from an evaluation of the base; `auto`: what the task is judged
    by before all else.

    Raises:
        UsageError: rows of this task do not have it, or it is neither better high nor low.
    """
    if name == AUTO:
        judged = [one for one in found.measures if measure_of(one).better != "neither"]
        name = judged[0] if judged else LOSS
    available = available_in(found)
    if name not in available:
        raise UsageError(
            f"This task has no metric {name!r}{suggest(name, available)}.",
            meaning=f"Its rows have {', '.join(available)}.",
            fix="Choose one of these; measures of text must be asked for: --set 'eval.metrics=[chrf]'.",
        )
    if name == LOSS:
        return _by_loss(found)
    if name == EXACT:
        return Metric(EXACT, "Exact match", "share", True, _exact, lambda row: row.matches is not None)
    measure = measure_of(name)
    return Metric(
        name, measure.title, measure.unit, measure.better == "higher", measure.value, measure.covers
    )


def early_metric(metric: Metric, found: Evaluation) -> Metric:
    """What trials are judged by before their end: the loss where the task has one that says something."""
    return _by_loss(found) if found.loss_title else metric


def available_in(found: Evaluation) -> list[str]:
    """Names of what these rows can be judged by."""
    exact = [EXACT] if found.exact_match is not None and not found.labels else []
    return [LOSS, *exact, *(one for one in found.measures if measure_of(one).better != "neither")]


def _by_loss(found: Evaluation) -> Metric:
    return Metric(LOSS, found.loss_title or "Loss", "nats", False, _loss, lambda row: True)


def _loss(rows: Rows) -> float:
    return sum(row.loss_sum for row in rows) / sum(row.tokens for row in rows)


def _exact(rows: Rows) -> float:
    return sum(bool(row.matches) for row in rows) / len(rows)
