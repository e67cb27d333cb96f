"""One process's part of a run: steps, evaluations and checkpoints, in an order that resumes exactly."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal

import torch
from torch import nn

from graftlm.core.errors import CheckpointError, TrainingError
from graftlm.core.seeding import capture_rng, restore_rng
from graftlm.training.callbacks import Announcer
from graftlm.training.checkpoint import published, rotate, save
from graftlm.training.gradient_check import FirstStep, watched
from graftlm.training.interfaces import B, BatchSource, Evaluate, Objective, TrainSettings
from graftlm.training.memory import peak_bytes
from graftlm.training.memory_classes import tensor_classes
from graftlm.training.memory_phases import BETWEEN, MemoryPhases
from graftlm.training.optim import learning_rate, set_learning_rate
from graftlm.training.progress import Progress
from graftlm.training.signals import StopRequests
from graftlm.training.step import StepStats, optimizer_step
from graftlm.training.timeline import Step, Timeline, Window

MAX_FAILURES = 3
Why = Literal["finished", "early_stopping", "interrupted"]


@dataclass
class Session(Generic[B]):
    """The moving parts of a run and the one place that advances them (`progress`)."""

    model: nn.Module
    objective: Objective[B]
    batches: BatchSource[B]
    parameters: Mapping[str, nn.Parameter]
    settings: TrainSettings
    run: Path
    identity: Mapping[str, Any]
    evaluate: Evaluate | None
    announce: Announcer
    stop: StopRequests
    timeline: Timeline
    total: int
    optimizer: torch.optim.Optimizer
    memory: MemoryPhases | None = None
    progress: Progress = field(default_factory=Progress)
    last_loss: float | None = None
    _bad_rows: list[tuple[int, ...]] = field(default_factory=list)
    _learnt: set[str] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where the first trained parameter lies; batches go there."""
        return next(iter(self.parameters.values())).device

    def resumed(self, progress: Progress) -> None:
        """Take over the progress of a checkpoint.

        Raises:
            CheckpointError: the data no longer give the position that was saved.
        """
        here = self._position(progress.step)
        if here != (progress.epoch, progress.position):
            raise CheckpointError(
                f"Step {progress.step} was saved at epoch {progress.epoch}, batch {progress.position}; "
                f"now it is at epoch {here[0]}, batch {here[1]}.",
                meaning="The batches are cut differently although their fingerprint is the same.",
                fix="Start in a new folder (--out).",
            )
        self.progress = progress

    def run_steps(self) -> Why:
        """Go on until the last step, a stop request or early stopping; the final state is saved.

        An evaluation that a stop request cut short is repeated by the resumed run before its first
        step: it is due as long as `progress.evaluated_step` lies behind.
        """
        while (why := self.prepared()) is None:
            self._step()
        return why

    @property
    def is_between(self) -> bool:
        """Whether something comes before the next step."""
        due = self._evaluation_due() or self._save_due() or self._is_stale()
        return due or self.stop() or self.progress.step >= self.total

    def prepared(self) -> Why | None:
        """All that comes before the next step: evaluations and checkpoints; why there is none, if so."""
        if self._evaluation_due() and not self.stop():
            self._evaluate()
        if self.stop() and (self.progress.step < self.total or self._evaluation_due()):
            why: Why = "interrupted"
        elif self._is_stale():
            why = "early_stopping"
        elif self.progress.step >= self.total:
            why = "finished"
        else:
            if self._save_due():
                self._save()
            return None
        self._save()
        return why

    def _step(self) -> None:
        random_state = capture_rng()
        try:
            step = self.begun()
        except KeyboardInterrupt:
            if not self.stop():
                raise
            restore_rng(random_state)  # who writes its batches itself gave up, as it was asked to
            return
        with self.watching() as first:
            stats = optimizer_step(
                self.model,
                self.objective,
                step.batches,
                self.parameters,
                self.optimizer,
                max_grad_norm=self.settings.max_grad_norm,
                stop_asked=self.stop,
                enter=self._enter,
            )
        self._enter(BETWEEN)
        if stats.outcome == "stopped":
            restore_rng(random_state)  # as if this window had never begun
            return
        self.finish(step, stats, first)

    def begun(self) -> Step[B]:
        """The next step, with its batches and its learning rate in place."""
        window = self.timeline.at(self.progress.step)
        rate = learning_rate(self.progress.step, self.total, self.settings)
        set_learning_rate(self.optimizer, rate)
        started = time.monotonic()
        batches = [self.batches.batch(window.epoch, index) for index in window.indices]
        return Step(window, rate, started, batches)

    def watching(self) -> AbstractContextManager[FirstStep | None]:
        """Inside, layers with parameters that were never seen to learn note that they run."""
        unseen = self.parameters.keys() - self._learnt
        return watched(self.model, unseen) if unseen else nullcontext()

    def finish(self, step: Step[B], stats: StepStats, first: FirstStep | None) -> None:
        """Count the step, and say what it did."""
        self._advance(stats)
        if stats.outcome == "applied":
            self._report(stats, step.window, step.rate, time.monotonic() - step.started)
            if first is not None:
                self._after_first(first, stats)
        else:
            self._report_skipped(stats)

    def _advance(self, stats: StepStats) -> None:
        applied = stats.outcome == "applied"
        step = self.progress.step + 1
        epoch, position = self._position(step)
        self.progress = self.progress.advanced(
            step=step,
            epoch=epoch,
            position=position,
            target_tokens=self.progress.target_tokens + (stats.target_tokens if applied else 0),
            skipped=self.progress.skipped + (not applied),
            failures=self.progress.failures + 1 if stats.outcome == "non_finite" else 0,
        )

    def _position(self, step: int) -> tuple[int, int]:
        window = self.timeline.at(step)
        return window.epoch, window.indices.start

    def _report(self, stats: StepStats, window: Window, rate: float, seconds: float) -> None:
        self.last_loss = stats.loss
        self._bad_rows.clear()
        extra = {"metrics": dict(stats.metrics)} if stats.metrics else {}
        self.announce(
            "step",
            step=self.progress.step,
            epoch=round(window.epochs_done, 4),
            loss=stats.loss,
            learning_rate=rate,
            grad_norm=stats.grad_norm,
            target_tokens=stats.target_tokens,
            real_tokens=stats.real_tokens,
            tokens_per_second=round(stats.real_tokens / max(seconds, 1e-9), 1),
            seconds=round(seconds, 4),
            memory_bytes=peak_bytes(self.device),
            **extra,
        )

    def _after_first(self, first: FirstStep, stats: StepStats) -> None:
        """What can be known as soon as one update was made: who learns, and what the tensors weigh."""
        is_first, self._learnt = not self._learnt, self._learnt | first.seen
        if (text := first.judge(stats.parameters)) is not None:
            self.announce("notice", text=text)
        if self.memory is not None and is_first:
            found = tensor_classes(
                self.model, self.parameters, self.optimizer, without_gradient=stats.parameters
            )
            self.announce("memory", step=self.progress.step, classes=[item.as_dict() for item in found])

    def _enter(self, phase: str) -> None:
        if self.memory is not None:
            self.memory.enter(phase)

    def _report_skipped(self, stats: StepStats) -> None:
        if stats.outcome == "no_targets":
            why = "no target token in the whole window"
        else:
            why = f"not finite: loss {stats.loss}, gradient norm {stats.grad_norm}"
            self._bad_rows.append(stats.rows)
        self.announce(
            "skipped", step=self.progress.step, why=why, rows=stats.rows, parameters=stats.parameters
        )
        if self.progress.failures >= MAX_FAILURES:
            raise TrainingError(
                f"{self.progress.failures} steps in a row were not finite, up to step {self.progress.step}.",
                problems=[
                    *(f"rows {', '.join(map(str, rows))}" for rows in self._bad_rows),
                    *(f"gradient of {name}" for name in stats.parameters[:10]),
                ],
                meaning="No such step was applied. The learning rate is too high, the precision too low "
                "(float16), or these rows are broken. The last checkpoint is good.",
                fix="Look at the rows, lower train.learning_rate or use model.dtype: bfloat16.",
            )

    def _evaluation_due(self) -> bool:
        step = self.progress.step
        every = self.settings.eval_steps
        here = step == self.total or (bool(every) and step % (every or 1) == 0)
        return self.evaluate is not None and here and self.progress.evaluated_step < step

    def _evaluate(self) -> None:
        """Evaluate without touching the training trajectory: modes and random state are put back."""
        if self.evaluate is None:
            return
        self._enter("evaluate")
        random_state = capture_rng()
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.no_grad():
                result = self.evaluate(self.stop)
        finally:
            for module, training in modes:
                module.training = training
            restore_rng(random_state)
            self._enter(BETWEEN)
        if result is None:
            return
        self.progress = self.progress.evaluated(result)
        extra = {"metrics": dict(result.metrics)} if result.metrics else {}
        self.announce(
            "evaluate",
            step=self.progress.step,
            loss=result.loss,
            tokens=result.tokens,
            rows=result.rows,
            **extra,
        )

    def _is_stale(self) -> bool:
        patience = self.settings.early_stopping_patience
        return bool(patience) and self.progress.stale >= (patience or 0)

    def _save_due(self) -> bool:
        step = self.progress.step
        every = self.settings.save_steps
        periodic = step > 0 and bool(every) and step % (every or 1) == 0
        return periodic or (bool(self.settings.early_stopping_patience) and self.progress.best_step == step)

    def _save(self) -> None:
        """Publish a checkpoint unless this step has one: its parameters would be the same."""
        if self.progress.step in published(self.run):
            return
        self._enter("save")
        path = save(
            self.run,
            parameters=self.parameters,
            optimizer=self.optimizer,
            progress=self.progress,
            identity=self.identity,
        )
        self._enter(BETWEEN)
        self.announce("checkpoint", step=self.progress.step, path=path.relative_to(self.run).as_posix())
        rotate(self.run, keep=self.settings.save_total_limit, best_step=self.progress.best_step)
