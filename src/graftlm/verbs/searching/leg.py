"""Trials from one rung to the next: ordinary runs in folders of their own, which stop there and can go on.

A trial is the run that `graft tune` makes of its recipe: the same functions train it, and a leg that ends at
a rung ends with a checkpoint that the next leg resumes exactly. Alone it is that run bit by bit; beside
others (`training.stacked`) up to the rounding of products with other numbers of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.core.events import read_events
from graftlm.core.files import remove_stale, write_atomic
from graftlm.core.progress import progress
from graftlm.evaluation.runner import Evaluation
from graftlm.models.generate import Progress, StopFlag
from graftlm.models.precision import AUTO, choose_device
from graftlm.models.recompute.policy import Policy
from graftlm.tasks.base import Task
from graftlm.training.callbacks import Event
from graftlm.training.checkpoint import published
from graftlm.training.interfaces import Evaluate
from graftlm.training.loop import TrainResult, train
from graftlm.training.memory_phases import MemoryPhases
from graftlm.training.recipe import Recipe
from graftlm.training.signals import StopRequests
from graftlm.training.start import Resume
from graftlm.training.timeline import Timeline
from graftlm.verbs.learner import Learner, attach_learner
from graftlm.verbs.plan import dtype_name, stored_as
from graftlm.verbs.run_folder import PLAN, RunFolder
from graftlm.verbs.searching.bench import Bench

TRAINING = ("forward", "backward", "update")
"""Phases whose memory is a trial's own."""


class StopAt(StopRequests):
    """Ends a run after a step, or when the whole search is asked to stop."""

    def __init__(self, asked: StopRequests, step: float, tick: Callable[[int], None]) -> None:
        super().__init__()
        self._asked, self._step, self._tick, self._reached = asked, step, tick, 0

    def __call__(self) -> bool:
        return self._asked() or self._reached >= self._step

    def hear(self, event: Event) -> None:
        """A callback of the run."""
        if event.kind in ("step", "skipped"):
            self._reached = int(event.fields["step"])
            self._tick(self._reached)
        elif event.kind == "start":
            self._reached = int(event.fields["start_step"])


@dataclass(frozen=True)
class Entry:
    """A trial that goes to a step: `until` names it, given the steps in all."""

    folder: RunFolder
    recipe: Recipe
    until: Callable[[int], int]


@dataclass(frozen=True)
class Leg:
    """What was found at its end."""

    step: int
    total_steps: int
    evaluation: Evaluation
    trainable: int
    peak: int
    """Bytes at the worst moment of training; 0 where no step was taken."""
    step_seconds: float
    """Of all steps since the trial began."""
    tokens: int
    """That went through the model in steps since the trial began."""


@dataclass
class Course:
    """Where legs are run: the shared bench, what is measured, who may ask for a stop."""

    bench: Bench
    metric: str
    stop: StopRequests
    halt: StopFlag
    policy: Policy = "nothing"
    """What trials side by side compute again in backward."""

    def alone(self, entry: Entry) -> Leg:
        """Go on with one trial.

        Raises:
            GraftError: the trial failed; KeyboardInterrupt: the search was asked to stop, at a checkpoint.
        """
        folder, model = entry.folder, self.bench.model(entry.recipe)
        task = self.bench.task(entry.recipe)
        learner = attach_learner(task, model, self.bench.tokenizer, task.recipe, folder.path / PLAN)
        try:
            folder.write_recipe(task.recipe)
            folder.write_json(PLAN, learner.plan.as_dict())
            total = total_steps(task, learner.batches)
            memory = MemoryPhases(choose_device(AUTO))
            with progress(f"trial {folder.path.name}") as tick:
                result = self._train(learner, entry, total, memory, tick)
            self.halt()
            found = self.bench.measure(task, self.metric, f"trial {folder.path.name}", self.halt)
            if is_whole(result, total):
                learner.save(folder.adapter)
            return leg_of(folder, result, total, found, learner.plan.trainable, _peak(memory))
        finally:
            learner.adapters.detach()

    def _train(
        self, learner: Learner, entry: Entry, total: int, memory: MemoryPhases, tick: Progress
    ) -> TrainResult:
        recipe, run = learner.task.recipe, entry.folder.path
        remove_stale(run)
        step = entry.until(total)
        stop = StopAt(self.stop, step if step < total else math.inf, lambda done: tick(done, step))
        with learner.in_use():
            learner.begin(run, self.halt)
            return train(
                learner.model,
                learner.objective,
                learner.batches,
                learner.parameters,
                recipe.train,
                run=run,
                resume=resume_of(run),
                identity=identity_of(recipe, learner.model),
                evaluate=evaluation_of(learner.task, learner.model),
                callbacks=[stop.hear],
                stop=stop,
                lora_b=learner.output_side,
                scales=learner.rate_scales,
                memory=memory,
            )


def identity_of(recipe: Recipe, model: nn.Module) -> Mapping[str, Any]:
    """What `graft tune` writes into the checkpoints of the same run."""
    method = {f"method.{key}": value for key, value in recipe.method.as_dict().items()}
    return {
        "base": recipe.model.name, "dtype": dtype_name(model), "quantization": stored_as(model),
        **method, "task": recipe.task.as_dict(),
    }  # fmt: skip


def leg_of(
    folder: RunFolder, result: TrainResult, total: int, found: Evaluation, trainable: int, peak: int
) -> Leg:
    # A step that was repeated after a kill is in the log twice; it counts once.
    steps = {event["step"]: event for event in read_events(folder.events) if event["kind"] == "step"}
    return Leg(
        step=total if is_whole(result, total) else result.step,
        total_steps=total,
        evaluation=found,
        trainable=trainable,
        peak=peak,
        step_seconds=sum(float(event["seconds"]) for event in steps.values()),
        tokens=sum(int(event["real_tokens"]) for event in steps.values()),
    )


def total_steps(task: Task[Any], batches: Any) -> int:
    train_section = task.recipe.train
    return Timeline(batches, train_section.gradient_accumulation_steps).total_steps(train_section)


def is_whole(result: TrainResult, total: int) -> bool:
    """A run that stopped by itself has reached its end."""
    return result.step >= total or result.why == "early_stopping"


def resume_of(run: Path) -> Resume:
    return "if_present" if published(run) else "never"


def evaluation_of(task: Task[Any], model: nn.Module) -> Evaluate | None:
    """Only a run that may stop by itself is measured between its rungs."""
    return task.held_out_loss(model) if task.recipe.train.early_stopping_patience else None


def _peak(memory: MemoryPhases) -> int:
    peaks = [peak.allocated or peak.resident for peak in memory.peaks() if peak.phase in TRAINING]
    return max(peaks, default=0)


def write_evaluation(folder: Path, rung: int, found: Evaluation) -> None:
    """Rows of a measurement, to be compared with those of other trials."""
    write_atomic(folder / "evaluation" / f"rung-{rung}.json", found.to_json())
