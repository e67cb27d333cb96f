"""What tasks are judged by: each measure is a function of evaluated rows, found by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from graftlm.evaluation.runner import EvaluatedRow

Rows = Sequence[EvaluatedRow]
Unit = Literal["share", "nats", "tokens", "points", "plain"]
"""How a value is shown: 0.93 as 93 %, with its unit, or as it is."""


@dataclass(frozen=True)
class Measure:
    """One figure of a set of rows."""

    name: str
    title: str
    value: Callable[[Rows], float]
    better: Literal["higher", "lower", "neither"]
    unit: Unit = "plain"


def mean_of(name: str) -> Callable[[Rows], float]:
    """The mean of a figure over the rows that have it.

    >>> mean_of("margin")([EvaluatedRow(1, "", 0.0, 1, figures={"margin": 2.0})])
    2.0
    """
    return lambda rows: fmean(row.figures[name] for row in rows if name in row.figures)


MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("accuracy", "Accuracy", mean_of("accuracy"), "higher", "share"),
        Measure("reward_accuracy", "Reward accuracy", mean_of("reward_accuracy"), "higher", "share"),
        Measure("reward_margin", "Reward margin", mean_of("reward_margin"), "higher"),
        Measure("kl", "KL to the base", mean_of("kl"), "neither", "nats"),
    )
}
"""Name -> measure. A task names those that it has in `Evaluation.measures`."""
