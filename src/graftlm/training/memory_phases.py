"""The most memory that each phase of a run took, and its time; both cost microseconds at every change."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graftlm.core.allocation import return_freed
from graftlm.training.memory import peak_since_reset, reset_peak

START, BETWEEN = "start", "between"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PhasePeak:
    """Bytes at the worst moment of all visits to one phase. Those of a GPU are None in a run without one."""

    phase: str
    resident: int
    allocated: int | None = None
    reserved: int | None = None


class MemoryPhases:
    """Tells forward from backward, and loading from saving, by their peaks.

    >>> phases = MemoryPhases(torch.device("cpu"))
    >>> with phases.during("load"):
    ...     block = torch.ones(2**20)
    >>> [peak.phase for peak in phases.peaks()]
    ['start', 'load']
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peaks: dict[str, PhasePeak] = {}
        self._now = START
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()
        self.failed_in = ""
        """The phase inside `during` that an error ended."""
        self.is_exact = True
        """False where peaks cannot be reset: then a phase shows the highest peak up to its end."""

    @property
    def now(self) -> str:
        """The phase that lasts."""
        return self._now

    def enter(self, phase: str) -> None:
        """The phase that has lasted until now is over, and `phase` begins."""
        self._note()
        self._count()
        self._now = phase
        self.is_exact &= reset_peak(_CPU)
        if self.device.type == "cuda":
            reset_peak(self.device)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase` inside, what was before afterwards; but the start is over for good.

        What the phase freed goes back to the system, so that the next one does not inherit its holes.
        """
        before = BETWEEN if self._now == START else self._now
        self.enter(phase)
        try:
            yield
        except BaseException:
            self.failed_in = phase
            raise
        finally:
            return_freed()
            self.enter(before)

    def peaks(self) -> tuple[PhasePeak, ...]:
        """Every phase in the order in which it first ended; what lies between them is left out."""
        return tuple(peak for phase, peak in self._peaks.items() if phase != BETWEEN)

    def seconds(self) -> dict[str, float]:
        """What every phase has taken so far in this process, and `between` what lay between them."""
        self._count()
        return dict(self._seconds)

    def as_list(self) -> list[dict[str, Any]]:
        """For an event."""
        return [asdict(peak) for peak in self.peaks()]

    def _count(self) -> None:
        now = time.monotonic()
        self._seconds[self._now] = self._seconds.get(self._now, 0.0) + now - self._since
        self._since = now

    def _note(self) -> None:
        found = PhasePeak(self._now, peak_since_reset(_CPU))
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            found = PhasePeak(self._now, found.resident, allocated, reserved)
        known = self._peaks.get(self._now)
        self._peaks[self._now] = found if known is None else _higher(known, found)


def highest(tables: Sequence[Sequence[PhasePeak]]) -> tuple[PhasePeak, ...]:
    """The peaks of several processes of one run, by phase."""
    merged: dict[str, PhasePeak] = {}
    for peak in (peak for table in tables for peak in table):
        known = merged.get(peak.phase)
        merged[peak.phase] = peak if known is None else _higher(known, peak)
    return tuple(merged.values())


def _higher(one: PhasePeak, other: PhasePeak) -> PhasePeak:
    def most(first: int | None, second: int | None) -> int | None:
        return None if first is None and second is None else max(first or 0, second or 0)

    return PhasePeak(
        one.phase,
        max(one.resident, other.resident),
        most(one.allocated, other.allocated),
        most(one.reserved, other.reserved),
    )
