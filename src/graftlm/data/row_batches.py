"""Rows of any kind to micro-batches; which row is where is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from graftlm.core.errors import DataError
from graftlm.core.seeding import derived_seed
from graftlm.data.batches import Batch


class SizedRow(Protocol):
    """A row that knows how many tokens it has."""

    @property
    def tokens(self) -> int: ...


R = TypeVar("R", bound=SizedRow)
B_co = TypeVar("B_co", bound=Batch, covariant=True)


class RowBatches(Generic[R, B_co]):
    """The micro-batches of every epoch: a number of rows each, in an order drawn anew for every epoch.

    collate: from rows to a batch. ids: the token ids of a row, and whatever else it is told from others by;
    the fingerprint is made of them. The order depends on (seed, epoch) only, not on `rows_per_batch`.
    """

    def __init__(
        self,
        rows: Sequence[R],
        collate: Callable[[Sequence[R]], B_co],
        *,
        ids: Callable[[R], Iterable[int]],
        rows_per_batch: int,
        seed: int,
    ) -> None:
        if not rows:
            raise DataError(
                "There are no rows to make batches of.",
                meaning="Every row was left out before.",
                fix="See the problems that `graft check` lists.",
            )
        self.known = tuple(rows)
        """All rows, each once."""
        self._collate = collate
        self._rows_per_batch = rows_per_batch
        self._seed = seed
        self._orders: dict[int, list[int]] = {}
        digest = hashlib.sha256(f"{rows_per_batch} {seed}".encode())
        for row in rows:
            values = array("q", ids(row))
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
        self.fingerprint = digest.hexdigest()
        """SHA-256 over all rows and settings: equal fingerprints give equal batches."""

    @property
    def most_tokens(self) -> int:
        """What no micro-batch exceeds, padding included."""
        return self._rows_per_batch * max(row.tokens for row in self.known)

    def packing_rate(self, epoch: int = 0) -> float:
        """Rows are not packed."""
        return 1.0

    def count(self, epoch: int) -> int:
        """Micro-batches of that epoch (the same in every epoch)."""
        return -(-len(self.known) // self._rows_per_batch)

    def batch(self, epoch: int, index: int) -> B_co:
        """Micro-batch `index` (from 0) of that epoch.

        Raises:
            IndexError: there is no such micro-batch.
        """
        if not 0 <= index < self.count(epoch):
            raise IndexError(f"epoch {epoch} has {self.count(epoch)} micro-batches, not {index + 1}")
        return self._collate(self.rows(epoch, index))

    def rows(self, epoch: int, index: int) -> list[R]:
        """The rows of that micro-batch."""
        start = index * self._rows_per_batch
        return [self.known[place] for place in self._order(epoch)[start : start + self._rows_per_batch]]

    def _order(self, epoch: int) -> list[int]:
        """Of the rows; only the last two epochs are kept."""
        if epoch not in self._orders:
            self._orders = dict([*self._orders.items()][-1:])
            self._orders[epoch] = self._planned(epoch)
        return self._orders[epoch]

    def _planned(self, epoch: int) -> list[int]:
        """Places of all rows in the order of that epoch."""
        generator = torch.Generator().manual_seed(derived_seed("rows", self._seed, epoch))
        return torch.randperm(len(self.known), generator=generator).tolist()
