"""Pairs to tensors: rows of like length together, as a pure function of (seed, epoch, position)."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import torch

from graftlm.core.errors import DataError
from graftlm.core.seeding import derived_seed
from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED
from graftlm.data.pairs import Pair

POOL = 32
"""Optimizer steps' worth of rows that are sorted by length together: enough for little padding, few enough
that a step's rows still differ from epoch to epoch."""
LONG, STEP_OF_LONG, STEP = 64, 8, 2
"""Widths are multiples of a step, from `LONG` tokens on of a larger one: a matrix product of a new shape is
prepared anew, and units of 16 bits want eights. Of short rows eights would waste a quarter."""


class PairBatches:
    """The micro-batches of every epoch.

    Rows are shuffled, sorted by length within pools of `POOL` steps, and the steps of a pool shuffled again:
    a step sees rows of like length, and steps come in any order. The order depends on (seed, epoch) and on
    `rows_per_step`, not on `rows_per_batch`: halving that during a run keeps every step's rows.

    Batches: `input_ids` [B, S], `attention_mask` [B, S], `decoder_input_ids` [B, T], padded on the right;
    labels [B, T], -100 on padding. What the decoder reads of padding nothing looks at.

    >>> rows = [Pair((5, 6), (7, 2), (0, 7), 1, False), Pair((5,), (2,), (0,), 2, False)]
    >>> batches = PairBatches(rows, rows_per_batch=2, rows_per_step=2, seed=0, pad_token_id=0)
    >>> batches.count(0), batches.batch(0, 0).target_tokens
    (1, 3)
    """

    def __init__(
        self, rows: Sequence[Pair], *, rows_per_batch: int, rows_per_step: int, seed: int, pad_token_id: int
    ) -> None:
        if not rows:
            raise DataError(
                "There are no rows to make batches of.",
                meaning="Every row was left out before.",
                fix="See the problems that `graft check` lists.",
            )
        self._rows, self._per_batch, self._per_step = tuple(rows), rows_per_batch, rows_per_step
        self._seed, self._pad = seed, pad_token_id
        self._order: tuple[int, list[int]] = (-1, [])
        self._content = _content_hash(self._rows)
        self.longest = longest(self._rows)
        """Tokens of the longest source, and of the longest target."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all rows and settings: equal fingerprints give equal batches."""
        settings = (self._per_batch, self._per_step, self._seed, self._pad)
        return hashlib.sha256(f"{self._content}{settings}".encode()).hexdigest()

    @property
    def most_tokens(self) -> int:
        """What no micro-batch exceeds, padding included."""
        return self._per_batch * sum(self.longest)

    def count(self, epoch: int) -> int:
        """Micro-batches of that epoch (the same in every epoch)."""
        return -(-len(self._rows) // self._per_batch)

    def batch(self, epoch: int, index: int) -> Batch:
        """Micro-batch `index` (from 0) of that epoch.

        Raises:
            IndexError: there is no such micro-batch.
        """
        if not 0 <= index < self.count(epoch):
            raise IndexError(f"epoch {epoch} has {self.count(epoch)} micro-batches, not {index + 1}")
        order = self._of_epoch(epoch)[index * self._per_batch : (index + 1) * self._per_batch]
        return padded([self._rows[number] for number in order], self._pad, self.longest)

    def packing_rate(self, epoch: int = 0) -> float:
        """Share of the tokens of that epoch's micro-batches that are no padding."""
        room = 0
        order = self._of_epoch(epoch)
        for start in range(0, len(order), self._per_batch):
            rows = [self._rows[number] for number in order[start : start + self._per_batch]]
            room += len(rows) * sum(map(_whole, longest(rows), self.longest))
        return sum(row.tokens for row in self._rows) / room

    def _of_epoch(self, epoch: int) -> list[int]:
        """Row numbers in their order, planned once per epoch; only the last epoch is kept."""
        if self._order[0] != epoch:
            self._order = (epoch, self._planned(epoch))
        return self._order[1]

    def _planned(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed("pairs", self._seed, epoch))
        shuffled = torch.randperm(len(self._rows), generator=generator).tolist()
        steps: list[list[int]] = []
        rest: list[int] = []
        pool = POOL * self._per_step
        for start in range(0, len(shuffled), pool):
            # Sorting is stable: rows of the same length stay shuffled.
            some = sorted(shuffled[start : start + pool], key=self._length)
            whole = len(some) - len(some) % self._per_step
            found = [some[place : place + self._per_step] for place in range(0, whole, self._per_step)]
            steps += [found[place] for place in torch.randperm(len(found), generator=generator).tolist()]
            rest = some[whole:]
        return [number for step in [*steps, rest] for number in step]

    def _length(self, number: int) -> tuple[int, int]:
        row = self._rows[number]
        return len(row.source), len(row.target)


def longest(rows: Sequence[Pair]) -> tuple[int, int]:
    """Tokens of the longest source, and of the longest target."""
    return max(len(row.source) for row in rows), max(len(row.target) for row in rows)


def padded(rows: Sequence[Pair], pad: int, most: tuple[int, int]) -> Batch:
    """One micro-batch of these rows, its source and its target never wider than `most`."""
    source, target = map(_whole, longest(rows), most)
    inputs = {
        "input_ids": _filled([row.source for row in rows], source, pad),
        "attention_mask": _filled([(1,) * len(row.source) for row in rows], source, 0),
        "decoder_input_ids": _filled([row.decoder for row in rows], target, pad),
    }
    labels = _filled([row.target for row in rows], target, IGNORED)
    tokens = sum(row.tokens for row in rows)
    return Batch(
        inputs, labels, sum(row.target_tokens for row in rows), tokens, tuple(row.row for row in rows)
    )


def _filled(rows: Sequence[tuple[int, ...]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def _whole(length: int, most: int) -> int:
    step = STEP if length < LONG else STEP_OF_LONG
    return min(-(-length // step) * step, most)


def _content_hash(rows: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        sizes = [row.row, len(row.source), len(row.target)]
        digest.update(array("q", [*sizes, *row.source, *row.target, *row.decoder]).tobytes())
    return digest.hexdigest()
