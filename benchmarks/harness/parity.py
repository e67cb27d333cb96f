"""The gate: a figure counts only if the side did the same work as the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.measurement import Run

LOSS, NORM = 2.5e-4, 1.5e-2
"""Largest relative differences of loss and gradient norm at any step: two to four times those of PEFT's ways
among themselves in 16 bits (6e-5 and 9e-3 over eight steps). Missing quantisation, a wrong scale or a lost
label is far outside (1e-3 and 4e-2)."""


@dataclass(frozen=True)
class Verdict:
    """How far a side is from the reference, and whether its figures count."""

    loss: float
    norm: float
    is_void: bool
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"void: {self.why}"
        return f"{'VOID: ' if self.is_void else ''}loss {self.loss:.0e}, norm {self.norm:.0e}"


def judge(run: Run, reference: Run, *, loss: float = LOSS, norm: float = NORM) -> Verdict:
    """Compare losses and gradient norms, step by step.

    >>> good = Run("a", losses=[2.0, 1.0], norms=[0.5, 0.5])
    >>> judge(Run("b", losses=[2.0, 1.1], norms=[0.5, 0.5]), good).is_void
    True
    """
    if run.failed:
        return Verdict(math.nan, math.nan, True, run.failed)
    if reference.failed or len(run.losses) != len(reference.losses):
        return Verdict(math.nan, math.nan, True, f"{reference.side} has no losses to compare with")
    if not all(map(math.isfinite, [*run.losses, *run.norms])) or min(run.norms) == 0.0:
        return Verdict(math.nan, math.nan, True, "a loss or gradient norm is zero or not finite")
    losses, norms = _furthest(run.losses, reference.losses), _furthest(run.norms, reference.norms)
    return Verdict(losses, norms, losses > loss or norms > norm)


def _furthest(mine: Sequence[float], its: Sequence[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(mine, its, strict=True))
