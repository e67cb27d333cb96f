"""What a plan offers and what it turns down, with the reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from graftlm.planning.candidates import Candidate
from graftlm.planning.estimates import MemoryEstimate, TimeEstimate
from graftlm.planning.machine import Machine
from graftlm.planning.workload import Workload
from graftlm.planning.written import written
from graftlm.training.recipe import Recipe


@dataclass(frozen=True)
class Fit:
    """How a candidate would run on the machine."""

    effective: Recipe
    """With what the run fills in: batch, rate, length."""
    workload: Workload
    recompute: str
    memory: MemoryEstimate
    time: TimeEstimate


@dataclass(frozen=True)
class Option:
    """A complete recipe that keeps every limit, with what it takes."""

    candidate: Candidate
    fit: Fit
    trainable: int
    cost: float | None
    """In the currency of the machine's price."""
    reasons: tuple[str, ...]

    @property
    def label(self) -> str:
        """Method, size and storage."""
        return self.candidate.label

    @property
    def recipe(self) -> Recipe:
        """What somebody would write to get this run."""
        return self.candidate.recipe

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        quality, train = self.candidate.standing.quality, self.fit.effective.train
        return {
            "label": self.label,
            "recipe": written(self.recipe),
            "changes": {key: dict(value) for key, value in self.candidate.changes.items()},
            "per_device_train_batch_size": train.per_device_train_batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "learning_rate": train.learning_rate,
            "recompute": self.fit.recompute,
            "memory": self.fit.memory.as_dict(),
            "time": self.fit.time.as_dict(),
            "cost": self.cost,
            "trainable": self.trainable,
            "quality": quality.as_dict(),
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class Rejected:
    """A candidate that breaks a limit."""

    label: str
    why: str
    remedy: str = ""
    """The one change that would make it possible."""
    needed_bytes: int | None = None
    """The least that it would take, where memory is what it lacks."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """Everything that a plan found, the best option first."""

    options: tuple[Option, ...]
    rejected: tuple[Rejected, ...]
    machine: Machine
    notes: tuple[str, ...] = ()
    """Where figures come from, and what they leave out."""

    @property
    def best(self) -> Option | None:
        """What `graft tune` would take; None where nothing keeps the limits."""
        return self.options[0] if self.options else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "options": [option.as_dict() for option in self.options],
            "rejected": [item.as_dict() for item in self.rejected],
            "machine": self.machine.as_dict(),
            "notes": list(self.notes),
        }
