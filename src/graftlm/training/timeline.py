"""Where a step lies: epochs are cut into windows of micro-batches, one window per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from graftlm.core.errors import DataError
from graftlm.training.interfaces import B, Batch, BatchSource, TrainSettings


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step."""

    epoch: int
    indices: range  # of micro-batches in the epoch
    batches_in_epoch: int

    @property
    def epochs_done(self) -> float:
        """Epochs finished once this window is done, with its fraction."""
        return self.epoch + self.indices.stop / self.batches_in_epoch


@dataclass(frozen=True)
class Step(Generic[B]):
    """A step that has begun: its micro-batches, its learning rate, and when that was (`time.monotonic`)."""

    window: Window
    rate: float
    started: float
    batches: Sequence[B]


class Timeline:
    """Pure mapping from steps to windows; the last window of an epoch may be shorter.

    Args:
        source: micro-batches; their number may differ from epoch to epoch (packing).
        accumulation: micro-batches per window.
    """

    def __init__(self, source: BatchSource[Batch], accumulation: int) -> None:
        self._source = source
        self._accumulation = accumulation
        self._counts: list[int] = []  # counting may cost a whole packing: once per epoch

    def total_steps(self, settings: TrainSettings) -> int:
        """`max_steps`, or the steps of `num_train_epochs` (a fraction of an epoch is rounded up)."""
        if settings.max_steps:
            return settings.max_steps
        whole = int(settings.num_train_epochs)
        part = settings.num_train_epochs - whole
        steps = sum(self._windows(epoch) for epoch in range(whole))
        return steps + (math.ceil(part * self._windows(whole)) if part else 0)

    def at(self, step: int) -> Window:
        """The window of the optimizer step that follows `step` finished ones."""
        epoch, left = 0, step
        while left >= self._windows(epoch):
            left -= self._windows(epoch)
            epoch += 1
        first, count = left * self._accumulation, self._count(epoch)
        return Window(epoch, range(first, min(first + self._accumulation, count)), count)

    def _windows(self, epoch: int) -> int:
        return math.ceil(self._count(epoch) / self._accumulation)

    def _count(self, epoch: int) -> int:
        while len(self._counts) <= epoch:
            count = self._source.count(len(self._counts))
            if count < 1:
                raise DataError(
                    "There is no training batch.",
                    meaning="No row is left after checking, splitting and truncation.",
                    fix="Run graft check on the data; give more rows or a larger max_length.",
                )
            self._counts.append(count)
        return self._counts[epoch]
