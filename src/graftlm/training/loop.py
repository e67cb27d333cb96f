"""The training loop: windows of micro-batches to a finished, durable, exactly resumable run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.core.errors import CheckpointError, GraftError, StorageError
from graftlm.core.events import EventLog
from graftlm.core.files import RunLock
from graftlm.training.callbacks import Announcer, Callback, EventWriter, Watch
from graftlm.training.checkpoint import published
from graftlm.training.interfaces import B, BatchSource, Evaluate, Objective, TrainSettings
from graftlm.training.memory import peak_bytes
from graftlm.training.memory_phases import MemoryPhases
from graftlm.training.optim import make_optimizer
from graftlm.training.out_of_memory import memory_errors
from graftlm.training.restore import load_trainable
from graftlm.training.session import Session, Why
from graftlm.training.signals import StopRequests
from graftlm.training.start import Resume, begin, require_owned, run_identity
from graftlm.training.timeline import Timeline

LOG = "events.jsonl"
LOCK = ".lock"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are means over target tokens; seconds are of this process only.

    `weights` is the step whose parameters the model holds now: the last one, or the best one when
    early stopping was on. `exit_code` is 0, 130 (Ctrl-C) or 143 (SIGTERM).
    """

    why: Why
    step: int
    total_steps: int
    train_loss: float | None
    best_step: int | None
    best_loss: float | None
    weights: int
    checkpoint: Path
    skipped: int
    seconds: float
    peak_memory_bytes: int
    exit_code: int


def train(
    model: nn.Module,
    objective: Objective[B],
    batches: BatchSource[B],
    parameters: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    *,
    run: Path,
    resume: Resume = "never",
    identity: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
    stop: StopRequests | None = None,
    lora_b: Callable[[str], bool] | Collection[str] = (),
    scales: Mapping[str, float] | None = None,
    memory: MemoryPhases | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """Train `parameters` of `model`; leave checkpoints and `events.jsonl` in the run folder.

    Args:
        model: on its device; its train/eval modes are put back at the end.
        parameters: everything that is trained, by a name that is the same in every process.
        run: the run folder; locked while this runs.
        resume: "never" refuses a folder with checkpoints; "if_present" goes on from the newest good one.
        identity: further JSON values that must not change on resume (base model, method, precision).
        evaluate: called every `eval_steps` and at the end, in eval mode, with a function to poll.
        callbacks: get every event after it is in the log.
        stop: a `StopRequests` the caller has entered, to honour signals outside training too.
        lora_b: names of the LoRA B matrices, or a function that tells them (for LoRA+).
        scales: name -> what the learning rate of a parameter is multiplied by, where it is not 1.
        memory: measures the phases of every step; it resets the process's high-water mark.
        watch: sees every event last, and answers with events of its own; what it raises ends the run.

    Raises:
        CheckpointError: the folder is in use, belongs to another run, or no checkpoint verifies.
        StorageError: no space; older checkpoints are intact and the run can be resumed.
        TrainingError: three windows in a row were not finite, parameters got no gradient, or out of memory.
    """
    require_owned(model, parameters)
    with opened_session(
        model, objective, batches, parameters, settings, run=run, identity=identity, evaluate=evaluate,
        callbacks=callbacks, stop=stop, lora_b=lora_b, scales=scales, memory=memory, watch=watch,
    ) as session:  # fmt: skip
        return _run(session, resume)


@contextlib.contextmanager
def opened_session(
    model: nn.Module,
    objective: Objective[B],
    batches: BatchSource[B],
    parameters: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    *,
    run: Path,
    identity: Mapping[str, Any] | None,
    evaluate: Evaluate | None,
    callbacks: Sequence[Callback],
    stop: StopRequests | None,
    lora_b: Callable[[str], bool] | Collection[str],
    scales: Mapping[str, float] | None,
    memory: MemoryPhases | None = None,
    watch: Watch | None = None,
) -> Iterator[Session[B]]:
    """The session of a run, its folder locked and its log open. Arguments are those of `train`."""
    timeline = Timeline(batches, settings.gradient_accumulation_steps)
    total = timeline.total_steps(settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(RunLock(run / LOCK))
        log = stack.enter_context(EventLog(run / LOG))
        yield Session(
            model=model,
            objective=objective,
            batches=batches,
            parameters=parameters,
            settings=settings,
            run=run,
            identity={**run_identity(settings, total), "data": batches.fingerprint, **(identity or {})},
            evaluate=evaluate,
            announce=Announcer([EventWriter(log), *callbacks], watch),
            stop=stop if stop is not None else stack.enter_context(StopRequests()),
            timeline=timeline,
            total=total,
            optimizer=make_optimizer(parameters, settings, lora_b=lora_b, scales=scales),
            memory=memory,
        )


def _run(session: Session[B], resume: Resume) -> TrainResult:
    started = time.monotonic()
    with failure_logged(session, started), modes_kept(session.model):
        begin(session, resume)
        session.model.train()
        return ended(session, session.run_steps(), started)


def ended(session: Session[B], why: Why, started: float) -> TrainResult:
    """The end of a run that has no further step."""
    progress = session.progress
    weights = progress.step if why == "interrupted" else _keep_best(session)
    seconds = round(time.monotonic() - started, 3)
    if why == "interrupted":
        session.announce("interrupted", step=progress.step)
    if session.memory is not None:
        session.announce("memory", step=progress.step, phases=session.memory.as_list())
    session.announce("end", step=progress.step, seconds=seconds, why=why)
    return TrainResult(
        why=why,
        step=progress.step,
        total_steps=session.total,
        train_loss=session.last_loss,
        best_step=progress.best_step,
        best_loss=progress.best_loss,
        weights=weights,
        checkpoint=published(session.run)[progress.step],
        skipped=progress.skipped,
        seconds=seconds,
        peak_memory_bytes=peak_bytes(session.device),
        exit_code=session.stop.exit_code if why == "interrupted" else 0,
    )


def _keep_best(session: Session[B]) -> int:
    """With early stopping, leave the best evaluated parameters in the model; gives their step."""
    best, last = session.progress.best_step, session.progress.step
    if not session.settings.early_stopping_patience or best is None or best == last:
        return last
    path = published(session.run).get(best)
    try:
        if path is None:
            raise CheckpointError(f"The checkpoint of step {best} is gone.")
        load_trainable(path, session.parameters)
    except CheckpointError as error:
        problem = "; ".join(error.problems) or error.seen
        session.announce("notice", text=f"Step {best} was the best, but cannot be loaded: {problem}")
        return last
    session.announce("notice", text=f"The model now holds step {best}, the best on held-out data.")
    return best


@contextlib.contextmanager
def failure_logged(session: Session[B], started: float) -> Iterator[None]:
    """An error inside is the end of the run, and its log says so."""
    try:
        with memory_errors(session.device):
            yield
    except GraftError as error:
        with contextlib.suppress(StorageError):  # the log may lie on the disk that is full
            seconds = round(time.monotonic() - started, 3)
            phase = session.memory.now if session.memory is not None else ""
            session.announce(
                "end", step=session.progress.step, seconds=seconds, why="failed", error=error.as_dict(),
                phase=phase,
            )  # fmt: skip
        raise


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whether each module trains is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
