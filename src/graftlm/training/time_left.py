"""How long a run still takes: what was predicted of it, until its own steps and measurements tell better."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean

from graftlm.training.callbacks import Event

RECENT = 20
"""Steps that the mean is taken over: a machine may get busier or quieter on the way."""


@dataclass(frozen=True)
class Expected:
    """What is known of a run before its first step; 0 where nothing is."""

    step: float = 0.0
    """Seconds of a step."""
    evaluation: float = 0.0
    """Seconds of measuring the held-out loss on the way."""
    eval_steps: int = 0
    """Steps between those."""
    afterwards: float = 0.0
    """Seconds behind the last step: the adapter is measured, saved and proved."""


class TimeLeft:
    """Listens to the events of a run and predicts its end.

    The first step of a process prepares what the others use, and stands for them only until the second.

    >>> left = TimeLeft(Expected(step=2.0, afterwards=5.0))
    >>> left(Event("start", {"total_steps": 10, "start_step": 0}))
    >>> left.seconds, left.text
    (25.0, '0:00:25')
    >>> for step, seconds in ((1, 9.0), (2, 1.0)):
    ...     left(Event("step", {"step": step, "seconds": seconds}))
    >>> left.seconds
    13.0
    """

    def __init__(
        self, expected: Expected | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._expected = expected or Expected()
        self._clock = clock
        self._total = self._step = 0
        self._steps: list[float] = []
        self._is_first = True
        self._evaluation = self._expected.evaluation
        self._since = clock()

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        if event.kind == "start":
            self._total, self._step = event.fields["total_steps"], event.fields["start_step"]
        elif event.kind in ("step", "skipped"):
            self._step = event.fields["step"]
            if "seconds" in event.fields:
                self._add(event.fields["seconds"])
        elif event.kind == "evaluate":
            self._evaluation = self._clock() - self._since
        self._since = self._clock()

    @property
    def seconds(self) -> float | None:
        """Until the run is over; None while nothing is known."""
        step = fmean(self._steps) if self._steps else self._expected.step
        if not step:
            return None
        between = self._evaluations * self._evaluation
        return (self._total - self._step) * step + between + self._expected.afterwards

    @property
    def text(self) -> str:
        """The same as a person reads it; a dash while nothing is known."""
        return "-" if self.seconds is None else str(timedelta(seconds=round(self.seconds)))

    @property
    def _evaluations(self) -> int:
        """Still to come; the last one is behind the last step."""
        every = self._expected.eval_steps
        if not every:
            return 0
        return self._total // every - self._step // every + (self._total % every > 0)

    def _add(self, seconds: float) -> None:
        if len(self._steps) == 1 and self._is_first:
            self._steps, self._is_first = [], False
        self._steps = [*self._steps[1 - RECENT :], seconds]
