"""A few real micro-batches of a planned run, on this machine: what they take corrects its predicted time."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.core.errors import UsageError
from graftlm.core.progress import progress
from graftlm.planning.correction import Seen, SeenStep, corrected
from graftlm.planning.cost import cost
from graftlm.planning.estimates import TimeEstimate
from graftlm.planning.option import Choice, Fit
from graftlm.planning.step_work import OPTIMIZER
from graftlm.tasks.base import Task
from graftlm.tasks.multi import MultiTask
from graftlm.tasks.table import task_of
from graftlm.training.recipe import Recipe
from graftlm.training.step import to_device
from graftlm.verbs.base import load_base
from graftlm.verbs.learner import Learner, attach_learner

PASSES = 3
"""Micro-batches; the first prepares what the others use, and does not count."""


def calibrated(choice: Choice) -> Choice:
    """The choice with the time of its best option corrected by real micro-batches of that very run.

    Loads the base and trains nothing. Ranks stay: the times of the other options change by the same factor.

    Raises:
        UsageError: nothing fits, the machine is not this one, or the task has to look at all rows first.
        GraftError: the run could not have started.
    """
    best, machine = choice.best, choice.machine
    if best is None or not machine.rates.is_measured:
        raise UsageError(
            "There is nothing to calibrate." if best is None else f"{machine.name} is not this machine.",
            meaning="A calibration takes real steps of the first option, here.",
            fix="Leave out --calibrate.",
        )
    after = time_of(best.fit, machine.start_seconds)
    factor = after.step_seconds / best.fit.time.step_seconds
    times = [after, *(_likewise(option.fit, factor) for option in choice.options[1:])]
    options = tuple(
        replace(option, fit=replace(option.fit, time=new), cost=cost(new.seconds, machine))
        for option, new in zip(choice.options, times, strict=True)
    )
    note = (
        f"{PASSES - 1} real micro-batches of {best.label} took {factor:.2f} times what was predicted; "
        "all times are corrected by that."
    )
    return replace(choice, options=options, notes=(*choice.notes, note))


def _likewise(fit: Fit, factor: float) -> TimeEstimate:
    """The time of another run, where the machine is as much slower or faster than it was thought to be."""
    step = SeenStep(fit.time.step_seconds * factor, 0)
    return replace(corrected(fit.time, fit.workload, Seen([step])), is_calibrated=False)


def time_of(fit: Fit, start_seconds: float) -> TimeEstimate:
    """The predicted time of a run, corrected by its first micro-batches."""
    started = time.monotonic()
    recipe = fit.effective
    task = _read(recipe)
    model, tokenizer = load_base(recipe.model, ending=task.ending)
    task.recipe = recipe
    task.encode(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        learner = attach_learner(task, model, tokenizer, recipe, Path(folder) / "plan.json")
    loaded = time.monotonic() - started + start_seconds
    optimizer = sum(part.amount for part in fit.time.step_parts if part.name == OPTIMIZER)
    times = fit.workload.mean_micro_batches or fit.workload.micro_batches
    steps = [
        SeenStep(seconds * times + optimizer, tokens * times) for seconds, tokens in _passes(learner)[1:]
    ]
    return corrected(fit.time, fit.workload, Seen(steps, {"load": loaded}))


def _read(recipe: Recipe) -> Task[Any]:
    task = task_of(recipe)
    if isinstance(task, MultiTask) or type(task).begin is not Task.begin:
        raise UsageError(
            f"Runs of task {task.name} are not calibrated.",
            meaning="Their steps need what is computed on all rows first.",
            fix="Leave out --calibrate; graft tune corrects the time that is left while it runs.",
        )
    task.read()
    task.settled()
    return task


def _passes(learner: Learner) -> list[tuple[float, int]]:
    """Seconds and real tokens of some micro-batches forward and backward; nothing is learnt."""
    model, parameters = learner.model, learner.parameters
    device = next(iter(parameters.values())).device
    count = min(PASSES, learner.batches.count(0))
    found = []
    model.train()
    with learner.in_use(), progress("calibrating") as tick:
        for number in range(count):
            batch = learner.batches.batch(0, number)
            started = time.monotonic()
            loss = learner.objective(model, to_device(batch, device))
            (loss.loss_sum / max(1, loss.target_tokens)).backward()
            float(loss.loss_sum.detach())  # waits for the device
            found.append((time.monotonic() - started, batch.real_tokens))
            for parameter in parameters.values():
                parameter.grad = None
            tick(number + 1, count)
    return found if len(found) > 1 else found * 2  # a run of one micro-batch has no second one
