"""What is predicted of a run before its first step, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from graftlm.core.errors import GraftError
from graftlm.core.notices import notice
from graftlm.core.progress import say
from graftlm.evaluation.report_data import PredictedFigure, Predictions
from graftlm.planning.amounts import in_gib, in_time
from graftlm.planning.base_facts import base_facts
from graftlm.planning.estimates import MemoryEstimate, Part, TimeEstimate
from graftlm.planning.hardware import this_machine
from graftlm.planning.history import Record, correction, kind_of_run, machine_key, read_records, remember
from graftlm.planning.kept_estimates import estimate_of, kept_memory
from graftlm.planning.speed import estimate_time
from graftlm.tasks.base import Task
from graftlm.training.memory_phases import MemoryPhases
from graftlm.training.recipe import Recipe
from graftlm.verbs.row_lengths import counted

FEWEST_STEPS = 10
"""A run with fewer says little about the time of a step, and is over before its rehearsal."""
_TIMES: Mapping[str, tuple[str, ...]] = {
    "load": ("load", "attach"),
    "evaluate": ("evaluate",),
    "save": ("save",),
    "verify": ("verify",),
}
"""Parts of a time estimate, and the phases of a run that they stand for; steps are in the log."""


@dataclass(frozen=True)
class Prediction:
    """Kept in the run's `plan.json`, so that a run that goes on is compared with what it began with."""

    machine: str
    """Its key in the history."""
    base: str
    method: str
    storage: str
    memory: MemoryEstimate
    """With the corrections of earlier runs."""
    time: TimeEstimate
    plain_peak: float
    """Of the model alone, without corrections: what the history learns from."""
    plain_step: float
    start_seconds: float
    """Until a process has imported everything, which is part of loading."""
    note: str
    """What corrected it."""

    @property
    def summary(self) -> str:
        """One line."""
        memory, time = self.memory, self.time
        return (
            f"about {in_gib(memory.peak)} at most ({memory.worst.name}) and {in_time(time.seconds)}, of "
            f"which "
            f"{in_time(next((part.amount for part in time.parts if part.name == 'steps'), 0.0))} are training"
        )

    def as_dict(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {**vars(self), "memory": self.memory.as_dict(), "time": self.time.as_dict()}


def predict(recipe: Recipe, task: Task[Any], recompute: str) -> Prediction | None:
    """What a run will take whose data are encoded and whose recomputation is known; None where that cannot be
    told, which is said."""
    try:
        facts, machine = base_facts(recipe.model.name, task.ending), this_machine(calibrate=False)
        workload = counted(task).workload(recipe)
        if workload.steps < FEWEST_STEPS:
            say(f"Plan   memory and time of fewer than {FEWEST_STEPS} steps are not predicted")
            return None
        memory = kept_memory(recipe, facts, workload, machine, recompute=recompute)
        time = estimate_time(recipe, facts, workload, machine, recompute=recompute)
    except GraftError as error:
        notice(f"Memory and time are not predicted: {error.seen}")
        return None
    kind = kind_of_run(recipe, facts)
    known = correction(read_records(), machine, **kind)
    return Prediction(
        machine=machine_key(machine),
        **kind,
        memory=known.of_memory(memory),
        time=known.of_time(time),
        plain_peak=memory.peak,
        plain_step=time.step_seconds,
        start_seconds=machine.start_seconds,
        note=known.note,
    )


def stored_prediction(plan: Path) -> Prediction | None:
    """The prediction in the plan of a run that goes on; None where there is none that can be read."""
    if not plan.is_file():
        return None
    found = json.loads(plan.read_text(encoding="utf-8")).get("predicted")
    try:
        return Prediction(**{**found, "memory": estimate_of(found["memory"]), "time": _time(found["time"])})
    except (TypeError, KeyError):
        return None


def _time(found: Mapping[str, Any]) -> TimeEstimate:
    parts, inside = (tuple(Part(**part) for part in found[name]) for name in ("parts", "step_parts"))
    rest = {name: found[name] for name in ("step_seconds", "is_calibrated", "base_seconds")}
    return TimeEstimate(parts, step_parts=inside, **rest)


def set_beside(
    prediction: Prediction, events: Sequence[Mapping[str, Any]], phases: MemoryPhases, *, is_whole: bool
) -> Predictions:
    """Predicted beside actual, for a report. `is_whole`: the run took place in this process from its start;
    else only its steps, which are in the log, have an actual time."""
    on_gpu = phases.device.type == "cuda"
    actual = {peak.phase: (peak.reserved or 0) if on_gpu else peak.resident for peak in phases.peaks()}
    peaks = [PredictedFigure(one.name, one.bytes, actual.get(one.name)) for one in prediction.memory.phases]
    seconds = phases.seconds() if is_whole else {}
    took: dict[str, float | None] = {
        part: sum(seconds.get(name, 0.0) for name in names) if seconds else None
        for part, names in _TIMES.items()
    }
    if seconds:
        took["load"] = (took["load"] or 0.0) + prediction.start_seconds
    took["steps"] = sum(_step_seconds(events))
    times = [PredictedFigure(part.name, part.amount, took.get(part.name)) for part in prediction.time.parts]
    return Predictions(tuple(peaks), tuple(times), prediction.note)


def keep_for_later(prediction: Prediction, events: Sequence[Mapping[str, Any]], phases: MemoryPhases) -> None:
    """Add a run that took place in this process to the history."""
    seconds = _step_seconds(events)
    if len(seconds) < FEWEST_STEPS:
        return
    on_gpu = phases.device.type == "cuda"
    peaks = [(peak.reserved or 0) if on_gpu else peak.resident for peak in phases.peaks()]
    remember(
        Record(
            machine=prediction.machine,
            base=prediction.base,
            method=prediction.method,
            storage=prediction.storage,
            predicted_peak=prediction.plain_peak,
            actual_peak=max(peaks, default=0),
            predicted_step=prediction.plain_step,
            actual_step=median(seconds),
            day=datetime.now(UTC).date().isoformat(),
        )
    )


def _step_seconds(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of every optimizer step; of one that was repeated, the last time."""
    steps = {event["step"]: float(event["seconds"]) for event in events if event["kind"] == "step"}
    return list(steps.values())
