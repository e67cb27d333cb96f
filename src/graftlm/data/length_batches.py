"""Rows of like length together: little padding, in an order that is drawn anew for every epoch."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

from graftlm.core.seeding import derived_seed
from graftlm.data.batches import Batch
from graftlm.data.row_batches import RowBatches, SizedRow

R = TypeVar("R", bound=SizedRow)
B_co = TypeVar("B_co", bound=Batch, covariant=True)

POOL = 512
"""Rows that are sorted by length together: enough for little padding, few enough that the rows of a step
still differ from epoch to epoch."""
STEP = 16
"""Rows that stay together; steps of this many rows come in any order."""


class LengthBatches(RowBatches[R, B_co], Generic[R, B_co]):
    """`RowBatches` whose rows are shuffled, sorted by length within pools of `POOL`, and then shuffled again
    in runs of `STEP`. The order depends on (seed, epoch) only: halving `rows_per_batch` keeps it."""

    def packing_rate(self, epoch: int = 0) -> float:
        """Share of the tokens of that epoch's micro-batches that are no padding."""
        lengths, size = [self.known[place].tokens for place in self._order(epoch)], self._rows_per_batch
        groups = [lengths[at : at + size] for at in range(0, len(lengths), size)]
        return sum(map(sum, groups)) / sum(len(group) * max(group) for group in groups)

    def _planned(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed("rows by length", self._seed, epoch))
        shuffled = torch.randperm(len(self.known), generator=generator).tolist()
        order: list[int] = []
        rest: list[int] = []
        for start in range(0, len(shuffled), POOL):
            # Sorting is stable: rows of the same length stay shuffled.
            pool = sorted(shuffled[start : start + POOL], key=lambda place: self.known[place].tokens)
            whole = len(pool) - len(pool) % STEP
            runs = [pool[at : at + STEP] for at in range(0, whole, STEP)]
            for at in torch.randperm(len(runs), generator=generator).tolist():
                order += runs[at]
            rest += pool[whole:]
        return [*order, *rest]
