"""`graft search`: many trials on one loaded base, the poor ones stopped early, the front reported."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from graftlm.core.errors import CheckpointError, GraftError, UsageError
from graftlm.core.files import RunLock
from graftlm.core.progress import say
from graftlm.search.budget import Budget
from graftlm.search.decisions import (
    allows_more,
    allows_whole,
    next_promotion,
    whole_trial,
)
from graftlm.search.stopping import rung_count, rung_steps
from graftlm.search.trials import Rung, Trial, read_trials, write_trial
from graftlm.training.recipe import Recipe
from graftlm.training.signals import StopRequests
from graftlm.verbs.searching.bench import Bench
from graftlm.verbs.searching.data import FINAL, SELECTION, TRAIN, part
from graftlm.verbs.searching.folder import Prepared, SearchFolder
from graftlm.verbs.searching.leg import Course, Entry, Leg, write_evaluation
from graftlm.verbs.searching.metric import Metric, early_metric, metric_of
from graftlm.verbs.searching.points import SAMPLED, Points, points_of
from graftlm.verbs.searching.saying import point_text, trial_line
from graftlm.verbs.searching.settings import SearchSettings
from graftlm.verbs.searching.side_by_side import legs, most_together

MOST_FAILURES = 3
"""Trials that may fail one after the other, from the first on, before the search gives up."""
ROUNDS = 4
"""A sampler learns from trials that are over: there are at least so many rounds of trials side by side."""
_POLL = 0.5
"""Seconds between looks at what other processes have done."""


class Searching:
    """One process's part of a search: it prepares, trains what is due, decides, until nothing is left."""

    def __init__(self, folder: SearchFolder, settings: SearchSettings, stop: StopRequests) -> None:
        self.folder, self.settings, self.stop = folder, settings, stop
        self.bench = Bench()
        self.prepared: Prepared
        self.metric: Metric
        self.course: Course
        self.points: Points

    def prepare(self) -> None:
        """Part the data, measure the base; what another process has prepared is taken over.

        Raises:
            GraftError: the data, the base or the metric cannot be used.
        """
        with self.folder.deciding:
            self._prepare()

    def run(self) -> list[Trial]:
        """Every trial of the finished search."""
        self.points = points_of(self.folder.path, self.settings)
        while True:
            self.halt()
            with ExitStack() as claims:
                trials = self._claimed_next(claims)
                if trials:
                    self._take(trials)
                    continue
            if not any(trial.is_due for trial in read_trials(self.folder.path)):
                return self._close()
            time.sleep(_POLL)

    def halt(self) -> bool:
        """False, or the end of this process's part."""
        if self.stop():
            raise KeyboardInterrupt(
                f"Trials are kept up to their last step. Go on: graft search {self.folder.path} --resume"
            )
        return False

    def recipe(self, fields: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial, on the parted data."""
        data = self.folder.data
        paths = {"data": {"path": str(data / TRAIN), "eval_path": str(data / SELECTION)}}
        settled = {"task": self.prepared.settled["task"]}
        more = {"data": {**self.prepared.settled.get("data", {}), **paths["data"]}}
        return self.settings.recipe_of(fields, settled, more)

    # Before the first trial.

    def _prepare(self) -> None:
        known = self.folder.prepared()
        if known is None:
            say("Data   parted into rows to train on, to select by, and for the final figure")
            parts = part(self.settings.recipe_of({}), self.folder.data)
            known = Prepared(parts.settled, parts.rows, parts.why)
        self.prepared = known
        recipe = self.recipe({})
        task = self.bench.task(recipe)
        base = self.folder.kept_evaluation("base-selection")
        if base is None:
            base = self.bench.measure(task, self.settings.metric, "base", self.halt)
            self.folder.keep_evaluation("base-selection", base)
        self.metric = metric_of(self.settings.metric, base)
        self.course = Course(self.bench, self.metric.name, self.stop, self.halt)
        if not known.metric:
            trials = self.settings.limits.trials or SAMPLED
            choice, policy = most_together(self.course, recipe, max(1, trials // ROUNDS), self.folder.path)
            known = replace(
                known,
                metric=self.metric.name,
                together=choice.together,
                together_why=choice.why,
                recompute=policy,
            )
            self.folder.keep_prepared(known)
        self.prepared, self.course.policy = known, known.recompute
        rows = self.prepared.rows
        say(f"Task   {task.name} ({self.prepared.why})")
        say(f"Data   {rows[TRAIN]:,} rows to train on, {rows[SELECTION]:,} to select by, {rows[FINAL]:,} for "
            "the final figure")  # fmt: skip
        if self._most > 1:
            why = "as asked" if self.settings.together else self.prepared.together_why
            say(f"Trials {self._most} at a time: {why}")
        say(f"Base   {self.metric.title.lower()} {self.metric.text(self.metric.score(base))}")

    # What is next.

    def _claimed_next(self, claims: ExitStack) -> list[Trial]:
        """Trials to work on, asked to go to their targets; nobody else gets them while `claims` lasts."""
        with self.folder.deciding:
            trials = self.points.known()
            self._require_possible(trials, self.settings.limits)
            found = [trial for trial in trials if trial.is_due and self._claimed(trial, claims)]
            if found:
                return found[: self._most]
            while len(found) < self._most and (trial := self._next(trials, found)) is not None:
                write_trial(self.folder.path, trial)
                if self._claimed(trial, claims):
                    found.append(trial)
                trials = self.points.known()
            return found

    def _next(self, trials: Sequence[Trial], own: Sequence[Trial]) -> Trial | None:
        """A new trial while the budget allows one, then those that go on to their next rung."""
        new = self.points.new(trials) if allows_more(trials, self.settings.limits) else None
        if new is not None:
            return new
        mine = {trial.number for trial in own}
        busy = any(trial.is_due and trial.number not in mine for trial in trials)
        found = next_promotion(trials, self.settings.costs, no_more=True, others_work=busy)
        return replace(found, target=found.target + 1) if found is not None else None

    @property
    def _most(self) -> int:
        """Trials at a time: their memory and seconds can be told apart only alone."""
        alone = {"memory", "seconds"} & set(self.settings.costs)
        return 1 if alone or self.settings.ladder else self.settings.together or self.prepared.together

    def _claimed(self, trial: Trial, claims: ExitStack) -> bool:
        """Whether no living process works on it; then this one does."""
        try:
            claims.enter_context(RunLock(self.folder.trial(trial.number).path / ".lock"))
        except CheckpointError:
            return False
        return True

    def _require_possible(self, trials: Sequence[Trial], budget: Budget) -> None:
        if allows_whole(trials, budget):
            return
        need = whole_trial(trials)
        raise UsageError(
            f"The budget of {budget.text} is less than one trial: about {need.seconds:,.0f} s, "
            f"{need.tokens:,} tokens.",
            meaning="A search needs at least one trial that is trained to its end.",
            fix="Give several times that, or make a trial shorter: --set train.num_train_epochs=1.",
        )

    # One leg.

    def _take(self, trials: Sequence[Trial]) -> None:
        started = time.monotonic()
        able, entries = list[Trial](), list[Entry]()
        for trial in trials:
            try:
                entries.append(self._entry(trial))
            except GraftError as error:  # settings that a recipe takes one by one, but not together
                self._failed(trial, error)
            else:
                able.append(trial)
        found = legs(self.course, entries)
        seconds = (time.monotonic() - started) / len(trials)
        for trial, leg in zip(able, found, strict=True):
            if isinstance(leg, GraftError):
                self._failed(trial, leg)
            else:
                self._reached(replace(trial, steps=self._steps(trial, leg.total_steps)), leg, seconds)

    def _entry(self, trial: Trial) -> Entry:
        return Entry(
            self.folder.trial(trial.number),
            self.recipe(trial.fields),
            lambda total: self._steps(trial, total)[trial.target],
        )

    def _steps(self, trial: Trial, total: int) -> tuple[int, ...]:
        """Every trial is measured as often as the first, at the same shares of its steps."""
        if trial.steps:
            return trial.steps
        if self.settings.stopping == "none" or self.settings.ladder:
            return (total,)
        begun = [other.steps for other in read_trials(self.folder.path) if other.steps]
        return rung_steps(total, len(begun[0]) if begun else rung_count(total))

    def _reached(self, trial: Trial, leg: Leg, seconds: float) -> None:
        folder = self.folder.trial(trial.number).path
        write_evaluation(folder, trial.reached, leg.evaluation)
        used = sum(rung.tokens for rung in trial.rungs)
        rung = Rung(
            step=leg.step,
            score=self.metric.score(leg.evaluation),
            early=early_metric(self.metric, leg.evaluation).score(leg.evaluation),
            loss=leg.evaluation.loss,
            costs={
                "parameters": leg.trainable,
                "memory": leg.peak,
                "seconds": round(leg.step_seconds / max(1, leg.step) * leg.total_steps, 3),
            },
            seconds=round(seconds, 3),
            tokens=max(0, leg.tokens - used),
        )
        trial = trial.climbed(rung)
        write_trial(self.folder.path, trial)
        if trial.state == "whole":
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        say(trial_line(self.metric, self.settings, read_trials(self.folder.path), trial))

    def _failed(self, trial: Trial, error: GraftError) -> None:
        why = " ".join([error.seen, *error.problems])
        write_trial(self.folder.path, replace(trial, state="failed", why=why))
        say(f"Trial {trial.number:<3} {point_text(trial.fields)} failed: {why}")
        trials = read_trials(self.folder.path)
        if len(trials) >= MOST_FAILURES and all(one.state == "failed" for one in trials):
            raise error

    # The end.

    def _close(self) -> list[Trial]:
        """No trial is waiting any more: who did not go on was stopped."""
        with self.folder.deciding:
            trials = []
            for trial in read_trials(self.folder.path):
                if trial.state == "running":
                    trial = replace(trial, state="stopped")
                    write_trial(self.folder.path, trial)
                    shutil.rmtree(self.folder.trial(trial.number).path / "checkpoints", ignore_errors=True)
                self.points.end(trial)
                trials.append(trial)
            return trials
