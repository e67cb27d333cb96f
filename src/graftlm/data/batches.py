"""Encoded rows to tensors; which row is where is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftlm.core.errors import DataError
from graftlm.data.encode import IGNORED, Encoded
from graftlm.data.packing import best_fit

WIDTH_STEP = 64
"""Packed widths are multiples of this, or `max_length`: kernels compiled per shape see few shapes."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows and T tokens.

    inputs: arguments of the model: `input_ids` [B, T], and `attention_mask` [B, T], or when packed
    `position_ids` [B, T]. labels: [B, T], unshifted, -100 where there is nothing to learn.
    target_tokens: labels that count (none is at position 0 of a document, so shifting loses none).
    real_tokens: tokens that are no padding. rows: the numbers of the rows in it. documents: how many tokens
    each document has that lies in each row, from its left; nothing where that is not known.
    `graftlm.data.forms.for_attention` gives the form that a model's attention reads.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    target_tokens: int
    real_tokens: int
    rows: tuple[int, ...]
    documents: tuple[tuple[int, ...], ...] = ()


class Batches:
    """The micro-batches of every epoch.

    Packed (`packing=True`): whole rows lie side by side in windows of `max_length` tokens. `position_ids`
    start at 0 in every document, and `documents` says where each ends; what keeps them from seeing each other
    depends on the model's attention, and is put in place by `graftlm.data.forms.for_attention`.

    Unpacked: rows are padded on the right, 2-D `attention_mask` [B, T], no `position_ids`.

    What holds for both, with `attn_implementation` "sdpa", "eager" or Graft's own: the loss of a document
    equals its loss alone, up to rounding (Llama and GPT-2 architectures, tested). A 4-D mask, which the first
    two get for packed windows, replaces a model's sliding window; that changes nothing while `max_length` is
    not larger than that window. Flash and flex attention find documents by their positions, which needs
    `use_cache=False`.

    Padding is -100 in the labels and 0 in the mask *by position*, so the pad token may equal a
    trained end token.

    The order of rows depends on (seed, epoch) only, not on `rows_per_batch`: halving it during a run
    keeps the same rows in the same global batch.

    >>> rows = [Encoded((5, 6, 7), (-100, 6, 7), row, False) for row in (1, 2, 3)]
    >>> batches = Batches(rows, rows_per_batch=1, max_length=8, packing=True, seed=0, pad_token_id=0)
    >>> batches.count(0), batches.batch(0, 0).inputs["input_ids"].shape[0]
    (2, 1)
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        *,
        rows_per_batch: int,
        max_length: int,
        packing: bool,
        seed: int,
        pad_token_id: int,
    ) -> None:
        if not encoded:
            raise DataError(
                "There are no rows to make batches of.",
                meaning="Every row was left out before.",
                fix="See the problems that `graft check` lists.",
            )
        longest = max(range(len(encoded)), key=lambda index: len(encoded[index].input_ids))
        if len(encoded[longest].input_ids) > max_length:
            raise DataError(
                f"Row {encoded[longest].row} has {len(encoded[longest].input_ids):,} tokens, "
                f"more than max_length {max_length:,}.",
                fix="Encode the rows with the same max_length.",
            )
        self._encoded = tuple(encoded)
        self._rows_per_batch = rows_per_batch
        self._max_length = max_length
        self._packing = packing
        self._seed = seed
        self._pad = pad_token_id
        self._plans: dict[int, list[list[int]]] = {}
        self._content = _content_hash(self._encoded)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all rows and settings: equal fingerprints give equal batches."""
        settings = (self._rows_per_batch, self._max_length, self._packing, self._seed, self._pad)
        return hashlib.sha256(f"{self._content}{settings}".encode()).hexdigest()

    @property
    def most_tokens(self) -> int:
        """What no micro-batch exceeds, padding included."""
        longest = max(len(row.input_ids) for row in self._encoded)
        return self._rows_per_batch * (self._max_length if self._packing else longest)

    def count(self, epoch: int) -> int:
        """Micro-batches of that epoch (the same in every epoch)."""
        return -(-len(self._plan(epoch)) // self._rows_per_batch)

    def batch(self, epoch: int, index: int) -> Batch:
        """Micro-batch `index` (from 0) of that epoch.

        Raises:
            IndexError: there is no such micro-batch.
        """
        if not 0 <= index < self.count(epoch):
            raise IndexError(f"epoch {epoch} has {self.count(epoch)} micro-batches, not {index + 1}")
        start = index * self._rows_per_batch
        windows = self._plan(epoch)[start : start + self._rows_per_batch]
        documents = [[self._encoded[row] for row in window] for window in windows]
        return (
            _packed(documents, self._pad, self._max_length)
            if self._packing
            else _padded(documents, self._pad)
        )

    def packing_rate(self, epoch: int = 0) -> float:
        """Share of the window tokens that are no padding (1.0 is perfect)."""
        plan = self._plan(epoch)
        room = len(plan) * self._max_length
        return sum(len(row.input_ids) for row in self._encoded) / room if self._packing else 1.0

    def _plan(self, epoch: int) -> list[list[int]]:
        """Windows of row indices, planned once per epoch; only the last two epochs are kept."""
        if epoch not in self._plans:
            generator = torch.Generator().manual_seed(_mix(self._seed, epoch))
            order = torch.randperm(len(self._encoded), generator=generator).tolist()
            if self._packing:
                lengths = [len(row.input_ids) for row in self._encoded]
                windows = best_fit(lengths, order, self._max_length)
                # Best fit leaves the longest rows in front.
                shuffled = torch.randperm(len(windows), generator=generator).tolist()
                plan = [windows[index] for index in shuffled]
            else:
                plan = [[row] for row in order]
            self._plans = dict([*self._plans.items()][-1:])
            self._plans[epoch] = plan
        return self._plans[epoch]


def _mix(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"graft batches {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes 63 bits


def _content_hash(encoded: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(array("q", [row.row, len(row.input_ids), *row.input_ids, *row.labels]).tobytes())
    return digest.hexdigest()


def _packed(windows: list[list[Encoded]], pad: int, max_length: int) -> Batch:
    longest = max(sum(len(row.input_ids) for row in window) for window in windows)
    width = min(-(-longest // WIDTH_STEP) * WIDTH_STEP, max_length)
    shape = (len(windows), width)
    ids = torch.full(shape, pad, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    real = 0
    for line, window in enumerate(windows):
        start = 0
        for row in window:
            stop = start + len(row.input_ids)
            ids[line, start:stop] = torch.tensor(row.input_ids)
            labels[line, start + 1 : stop] = torch.tensor(row.labels[1:], dtype=torch.long)
            positions[line, start:stop] = torch.arange(stop - start)
            start = stop
        real += start
    return _batch({"input_ids": ids, "position_ids": positions}, labels, real, windows)


def _padded(windows: list[list[Encoded]], pad: int) -> Batch:
    rows = [row for window in windows for row in window]
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    ids = torch.full(shape, pad, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for line, row in enumerate(rows):
        stop = len(row.input_ids)
        ids[line, :stop] = torch.tensor(row.input_ids)
        labels[line, 1:stop] = torch.tensor(row.labels[1:], dtype=torch.long)
        mask[line, :stop] = 1
    real = sum(len(row.input_ids) for row in rows)
    return _batch({"input_ids": ids, "attention_mask": mask}, labels, real, [[row] for row in rows])


def _batch(
    inputs: dict[str, torch.Tensor], labels: torch.Tensor, real: int, windows: list[list[Encoded]]
) -> Batch:
    targets = int((labels != IGNORED).sum())
    rows = tuple(row.row for window in windows for row in window)
    documents = tuple(tuple(len(row.input_ids) for row in window) for window in windows)
    return Batch(inputs, labels, targets, real, rows, documents)
