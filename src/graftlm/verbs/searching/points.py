"""Where new trials come from: a sampler over a space, or the next step of a ladder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from graftlm.search.decisions import candidates
from graftlm.search.ladder import STEPS, Climb, climb
from graftlm.search.study import Known, Study, propose
from graftlm.search.trials import Trial, read_trials, write_trial
from graftlm.verbs.searching.settings import SearchSettings

SAMPLED = 40
"""Trials that a sampler reckons with where the budget is a time or tokens."""


class Points(Protocol):
    """Called by one process at a time."""

    def known(self) -> list[Trial]:
        """Every trial that was begun, by number."""

    def new(self, trials: Sequence[Trial]) -> Trial | None:
        """The next one; None where there is none, for now or for good."""

    def end(self, trial: Trial) -> None:
        """The trial is over."""


def points_of(folder: Path, settings: SearchSettings) -> Points:
    """Of a search."""
    return Ladder(folder) if settings.ladder else Sampled(folder, settings)


class Sampled:
    """Points that Optuna proposes, kept in its journal."""

    def __init__(self, folder: Path, settings: SearchSettings) -> None:
        self._folder, self._settings, self._space = folder, settings, settings.domain
        self._study = Study(folder, 1 + len(settings.costs))

    def known(self) -> list[Trial]:
        """Of a point that a killed process had only noted, a trial is made."""
        trials = read_trials(self._folder)
        there = {trial.number for trial in trials}
        for number, point in enumerate(self._study.points(self._space)):
            if number not in there:
                trials.append(Trial(number, point, self._space.fields(point)))
                write_trial(self._folder, trials[-1])
        return sorted(trials, key=lambda trial: trial.number)

    def new(self, trials: Sequence[Trial]) -> Trial | None:
        settings, space = self._settings, self._space
        found = propose(
            space,
            [Known(trial.point, self._values(trial), trial.memory) for trial in trials],
            sampler=settings.sampler,
            seed=settings.seed,
            objectives=1 + len(settings.costs),
            trials=settings.limits.trials or SAMPLED,
        )
        if found is None:
            return None
        number = self._study.begin(found.point, space)
        return Trial(number, found.point, space.fields(found.point), memory=found.memory)

    def end(self, trial: Trial) -> None:
        last = candidates([trial], trial.reached - 1, self._settings.costs) if trial.rungs else []
        values = (last[0].score.value, *last[0].costs) if last else None
        self._study.end(trial.number, values, is_whole=trial.state == "whole")

    def _values(self, trial: Trial) -> tuple[float, ...] | None:
        """What the sampler learns of a trial: all as they were at the first rung, to be compared."""
        found = candidates([trial], 0, self._settings.costs)
        return (found[0].score.value, *found[0].costs) if found else None


class Ladder:
    """The steps of the ladder, each a trial trained whole; its number is that of the step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def known(self) -> list[Trial]:
        return read_trials(self._folder)

    def new(self, trials: Sequence[Trial]) -> Trial | None:
        if any(trial.state == "running" for trial in trials):
            return None  # what comes next depends on it
        step = climbed(trials).next
        return None if step is None else Trial(step, STEPS[step].fields, STEPS[step].fields)

    def end(self, trial: Trial) -> None:
        """Its own file says all."""


def climbed(trials: Sequence[Trial]) -> Climb:
    """Where the climb of these trials stands."""
    return climb([trial.rungs[-1].score if trial.state == "whole" else None for trial in trials])
