"""What earlier runs took beside what was predicted: kept for the user, so that later predictions are nearer.

A line of JSON for each finished run, in the cache folder. It corrects predictions and nothing else: no number
of a run depends on it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from graftlm.core.cache import cache_folder
from graftlm.core.errors import StorageError
from graftlm.core.files import write_atomic
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.estimates import MemoryEstimate, Part, TimeEstimate
from graftlm.planning.machine import Machine
from graftlm.training.recipe import Recipe

FILE = "history.jsonl"
MOST = 500
"""Lines that are kept; the oldest go."""
PRIOR = 1.0
"""How many runs like this one the models themselves count for."""
OTHER = 0.25
"""What a run with another base, method or storage counts for, on the same machine ..."""
MOST_OTHERS = 1.0
"""... and what all of them together count for at most."""
FURTHEST = 2.0
"""No correction is larger than this factor."""
_STEPS = "steps"


@dataclass(frozen=True)
class Record:
    """One finished run. `predicted` figures are those of the models alone, without any history."""

    machine: str
    base: str
    method: str
    storage: str
    predicted_peak: float
    actual_peak: float
    predicted_step: float
    """Seconds of one optimizer step."""
    actual_step: float
    day: str


@dataclass(frozen=True)
class Correction:
    """Factors on predictions for runs of one kind on one machine."""

    memory: float = 1.0
    step: float = 1.0
    runs: int = 0
    """Earlier runs on this machine behind them."""

    @property
    def note(self) -> str:
        """For people; nothing where there is no history."""
        if not self.runs:
            return ""
        runs = f"{self.runs} earlier run{'s' * (self.runs > 1)} on this machine"
        return f"Corrected by {runs}: memory x {self.memory:.2f}, time of a step x {self.step:.2f}."

    def of_memory(self, estimate: MemoryEstimate) -> MemoryEstimate:
        """The estimate with every part scaled."""
        phases = tuple(
            replace(phase, parts=tuple(Part(part.name, part.amount * self.memory) for part in phase.parts))
            for phase in estimate.phases
        )
        return replace(estimate, phases=phases)

    def of_time(self, estimate: TimeEstimate) -> TimeEstimate:
        """The estimate with its steps scaled; what lies around them stays."""
        if estimate.is_calibrated:  # a real step of this very run knows better
            return estimate
        parts = (Part(p.name, p.amount * (self.step if p.name == _STEPS else 1.0)) for p in estimate.parts)
        inside = (Part(part.name, part.amount * self.step) for part in estimate.step_parts)
        return replace(
            estimate,
            parts=tuple(parts),
            step_seconds=estimate.step_seconds * self.step,
            step_parts=tuple(inside),
        )


def machine_key(machine: Machine) -> str:
    """One name for a machine as far as memory and time depend on it; its rates may be measured anew."""
    parts = (machine.name, machine.device, machine.memory_bytes, machine.cores, *machine.instruction_sets)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def remember(record: Record) -> None:
    """Add a run. Figures that are no numbers above 0 are left out; a folder that cannot be written is no
    error."""
    figures = (record.predicted_peak, record.actual_peak, record.predicted_step, record.actual_step)
    if not all(math.isfinite(figure) and figure > 0 for figure in figures):
        return
    path = cache_folder(FILE)
    kept = [*read_records(path), record][-MOST:]
    try:
        write_atomic(path, "".join(json.dumps(asdict(each), sort_keys=True) + "\n" for each in kept))
    except (OSError, StorageError):
        return  # it only made later predictions nearer


def read_records(path: Path | None = None) -> list[Record]:
    """Every run that can be read, the oldest first; damaged lines are passed over."""
    try:
        lines = (path or cache_folder(FILE)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return list(_records(lines))


def _records(lines: Sequence[str]) -> Iterator[Record]:
    for line in lines:
        try:
            found = Record(**json.loads(line))
            figures = (found.predicted_peak, found.actual_peak, found.predicted_step, found.actual_step)
            if all(math.isfinite(figure) and figure > 0 for figure in figures):
                yield found
        except (TypeError, ValueError):
            continue


def correction(
    records: Sequence[Record], machine: Machine, *, base: str, method: str, storage: str
) -> Correction:
    """What earlier runs on the same machine say of a run: the mean of their errors on a logarithmic scale,
    drawn towards no correction as long as they are few."""
    here = [each for each in records if each.machine == machine_key(machine)]
    kind = (base, method, storage)
    alike = [(each.base, each.method, each.storage) == kind for each in here]
    other = min(OTHER, MOST_OTHERS / max(1, alike.count(False)))
    weights = [1.0 if same else other for same in alike]

    def factor(ratio: Callable[[Record], float]) -> float:
        total = sum(w * math.log(ratio(each)) for w, each in zip(weights, here, strict=True))
        mean = total / (sum(weights) + PRIOR)
        return math.exp(max(-math.log(FURTHEST), min(math.log(FURTHEST), mean)))

    return Correction(
        factor(lambda each: each.actual_peak / each.predicted_peak),
        factor(lambda each: each.actual_step / each.predicted_step),
        len(here),
    )


def kind_of_run(recipe: Recipe, facts: BaseFacts) -> dict[str, Any]:
    """The arguments of `correction` that tell runs of one kind from others."""
    return {"base": facts.name, "method": recipe.method.type, "storage": recipe.model.quantization}
