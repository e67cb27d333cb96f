"""What is predicted of a run, with the parts that it is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """One named part of a prediction: bytes or seconds."""

    name: str
    amount: float


@dataclass(frozen=True)
class Phase:
    """The worst moment of one phase of a run (`load`, `evaluate`, `forward`, `backward`, `update`, `save`,
    `verify`: the names in the run's memory events), as a stack of parts in bytes."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Of all parts."""
        return round(sum(part.amount for part in self.parts))


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted memory of a run by phase. On a GPU this is the GPU's memory."""

    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Phase:
        """The phase that decides whether a run fits."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the run."""
        return self.worst.bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "peak": self.peak, "worst": self.worst.name}


@dataclass(frozen=True)
class TimeEstimate:
    """Predicted seconds of a run: `parts` are load, evaluate, steps, save, verify."""

    parts: tuple[Part, ...]
    step_seconds: float
    step_parts: tuple[Part, ...] = ()
    """Of one optimizer step: base products, adapter products, attention, head, passes over memory, optimizer,
    decoding of a packed base, recomputation, operations."""
    is_calibrated: bool = False
    """Whether a real step of this very run is behind it."""
    base_seconds: float = 0.0
    """Of the part `evaluate`: what measuring the base takes, before the first step."""

    @property
    def seconds(self) -> float:
        """The whole run."""
        return sum(part.amount for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "seconds": self.seconds}
