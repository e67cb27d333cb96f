"""What a search says of its trials while it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.search.decisions import spent, to_finish
from graftlm.search.space import condition_text
from graftlm.search.trials import Trial
from graftlm.verbs.searching.metric import LOSS, Metric
from graftlm.verbs.searching.settings import SearchSettings


def trial_line(metric: Metric, settings: SearchSettings, trials: Sequence[Trial], trial: Trial) -> str:
    """A trial that has reached a rung."""
    rung = trial.rungs[-1]
    seconds = 0.0 if settings.ladder else seconds_left(settings, trials)
    left = f" (about {seconds:,.0f} s left)" if seconds else ""
    figure = f"{metric.title.lower()} {metric.text(rung.score)}"
    if metric.name != LOSS and rung.early != rung.score:
        figure += f", loss {rung.loss:.4f}"
    where = f"after {rung.step:,} of {trial.steps[-1]:,} steps{left}"
    return f"Trial {trial.number:<3} {point_text(trial.fields)}: {figure} {where}"


def seconds_left(settings: SearchSettings, trials: Sequence[Trial]) -> float:
    """Of work for one process, as far as legs until now tell."""
    budget = settings.limits
    wanted = min(settings.domain.size, budget.trials or math.inf)
    more = 0 if math.isinf(wanted) else max(0, int(wanted) - len(trials))
    if budget.seconds is not None and (more or math.isinf(wanted)):
        return max(0.0, budget.seconds - spent(trials).seconds)
    return to_finish(trials, more).seconds


def point_text(fields: Mapping[str, Any]) -> str:
    """The choices of a trial, without the names of their sections.

    >>> point_text({"method.r": 8, "train.learning_rate": 2e-4})
    'r=8 learning_rate=0.0002'
    """
    return " ".join(condition_text((name.rpartition(".")[2], value)) for name, value in fields.items())
