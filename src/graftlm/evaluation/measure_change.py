"""What a task is judged by, before and after on the same rows, with intervals from resampled rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graftlm.core.errors import DataError
from graftlm.evaluation.measures import MEASURES, Better, MeanOf, Measure, Rows, Unit
from graftlm.evaluation.metrics import (
    RESAMPLES,
    Floats,
    Interval,
    percentile_interval,
    percentile_level,
    wilson,
)
from graftlm.evaluation.parts import part_measure
from graftlm.evaluation.runner import EvaluatedRow, Evaluation

FEWER_RESAMPLES = 1_000
"""Of a measure that is no mean: each resample costs a pass over the rows."""
_GATHER = 2_000_000  # indices drawn at a time: bounds the memory of a resampled mean


@dataclass(frozen=True)
class MeasureChange:
    """One figure of the same rows before and after.

    `difference` is after - before, resampled in pairs, so its interval is narrower than those of the two
    values. `rows` are those that the figure is about.
    """

    name: str
    title: str
    unit: Unit
    better: Better
    before: Interval
    after: Interval
    difference: Interval
    rows: int


def measure_of(name: str) -> Measure:
    """The measure of a name.

    Raises:
        DataError: there is none.
    """
    found = MEASURES.get(name) or part_measure(name)
    if found is None:
        raise DataError(f"No measure is called {name!r}.", meaning=f"There are {', '.join(MEASURES)}.")
    return found


def measure_changes(before: Evaluation, after: Evaluation, *, seed: int = 0) -> tuple[MeasureChange, ...]:
    """Every measure that both evaluations name, in the order of `after`.

    Raises:
        DataError: a measure is unknown, or a row's figures are not finite.
    """
    names = [name for name in after.measures if name in before.measures]
    found = [_change(measure_of(name), before.rows, after.rows, seed) for name in names]
    return tuple(change for change in found if change is not None)


def measured(evaluation: Evaluation, *, seed: int = 0) -> dict[str, Interval]:
    """Every measure of one evaluation with its interval, where there is nothing to compare it with."""
    return {change.name: change.after for change in measure_changes(evaluation, evaluation, seed=seed)}


def _change(measure: Measure, before: Rows, after: Rows, seed: int) -> MeasureChange | None:
    both = zip(before, after, strict=True)
    pairs = [(old, new) for old, new in both if measure.covers(old) and measure.covers(new)]
    if not pairs:
        return None
    old, new = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    values = _finite(measure, old), _finite(measure, new)
    draw = _drawn_means if isinstance(measure.value, MeanOf) else _drawn
    drawn_old, drawn_new = draw(measure, old, new, np.random.default_rng(seed))
    level = percentile_level(len(pairs))
    return MeasureChange(
        name=measure.name,
        title=measure.title,
        unit=measure.unit,
        better=measure.better,
        before=_interval(measure, old, values[0], drawn_old, level),
        after=_interval(measure, new, values[1], drawn_new, level),
        difference=percentile_interval(values[1] - values[0], drawn_new - drawn_old, level),
        rows=len(pairs),
    )


def _finite(measure: Measure, rows: Rows) -> float:
    value = measure.value(rows)
    if not math.isfinite(value):
        raise DataError(
            f"{measure.title} is {value} on the {len(rows)} held-out rows.",
            meaning="A row's figure is not a finite number.",
            fix="Look at the rows' figures in the run folder's evaluation files.",
        )
    return value


def _interval(measure: Measure, rows: Rows, value: float, drawn: Floats, level: float) -> Interval:
    """A share of yes and no gets Wilson's interval, which is sound at 0 and 1 where resampling is not."""
    if isinstance(measure.value, MeanOf):
        flags = [row.figures[measure.value.name] for row in rows]
        if all(flag in (0.0, 1.0) for flag in flags):
            return wilson(round(sum(flags)), len(flags))
    return percentile_interval(value, drawn, level)


def _drawn_means(
    measure: Measure, old: Rows, new: Rows, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """Means of rows drawn with replacement, the same rows on both sides, a bounded block at a time."""
    assert isinstance(measure.value, MeanOf)
    columns = np.array([[row.figures[measure.value.name] for row in rows] for rows in (old, new)], float)
    count, block = len(old), max(1, _GATHER // len(old))
    parts = []
    for start in range(0, RESAMPLES, block):
        picked = generator.integers(count, size=(min(block, RESAMPLES - start), count), dtype=np.int32)
        parts.append(np.stack([column[picked].mean(axis=1) for column in columns]))
    drawn = np.concatenate(parts, axis=1)
    return drawn[0], drawn[1]


def _drawn(measure: Measure, old: Rows, new: Rows, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Values of rows drawn with replacement; draws on which the measure is not defined are left out."""
    found: list[tuple[float, float]] = []
    for _ in range(FEWER_RESAMPLES):
        picked = generator.integers(len(old), size=len(old)).tolist()
        values = _of(measure, old, picked), _of(measure, new, picked)
        if all(map(math.isfinite, values)):
            found.append(values)
    drawn = np.array(found or [(measure.value(old), measure.value(new))], float)
    return drawn[:, 0], drawn[:, 1]


def _of(measure: Measure, rows: Sequence[EvaluatedRow], picked: Sequence[int]) -> float:
    return measure.value([rows[index] for index in picked])
