"""Labelled rows to token ids with a target, as the tokenizer itself frames texts and pairs of texts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED
from graftlm.data.labels.records import Labelled, Tagged
from graftlm.data.labels.values import Problem as Told
from graftlm.data.records import Problem

CHUNK = 1024
"""Rows tokenised per call: large enough for the tokenizer's own parallelism."""
WIDTH = 8
"""Widths are multiples of this: a matrix product of a new shape is prepared anew."""


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One text or pair ready for a model.

    types: which of two texts each token belongs to, for models that are told; else nothing. target: 0 or 1
    for every label, or the number to tell.
    """

    input_ids: tuple[int, ...]
    types: tuple[int, ...]
    target: tuple[float, ...]
    record: Labelled
    truncated: bool

    @property
    def row(self) -> int:
        """Its 1-based number in the file."""
        return self.record.row

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return len(self.input_ids)

    @property
    def target_tokens(self) -> int:
        """One thing is told of a row."""
        return 1

    @property
    def identity(self) -> tuple[int, ...]:
        """Whole numbers that tell the row from every other."""
        target = array("q", array("d", self.target).tobytes())
        return (self.row, len(self.input_ids), *self.input_ids, *self.types, *target)


@dataclass(frozen=True, slots=True)
class TaggedRow:
    """One sentence ready for a model. labels: the number of a word's tag at its first token, else -100."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    record: Tagged
    truncated: bool

    @property
    def row(self) -> int:
        """Its 1-based number in the file."""
        return self.record.row

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return len(self.input_ids)

    @property
    def target_tokens(self) -> int:
        """Words whose tag is told."""
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def identity(self) -> tuple[int, ...]:
        """Whole numbers that tell the row from every other."""
        return (self.row, *self.input_ids, *self.labels)


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """A batch with `targets`: [B] label numbers (int64), [B, labels] of 0 and 1, or [B] numbers (float32).

    `labels` are -100 but at the last token of each row, which a causal model reads for the whole row.
    """

    targets: Tensor = field(default_factory=lambda: torch.empty(0))


def encode_labelled(
    records: Sequence[Labelled], tokenizer: Any, max_length: int, labels: Sequence[str]
) -> tuple[tuple[LabelledRow, ...], tuple[Problem, ...]]:
    """Rows with token ids; texts that are too long lose their end, of a pair the longer one does.

    labels: all there are, in order; none where numbers are told.
    """
    rows: list[LabelledRow] = []
    problems: list[Problem] = []
    for start in range(0, len(records), CHUNK):
        some = records[start : start + CHUNK]
        texts = [record.texts[0] for record in some]
        pairs = [record.texts[1] for record in some] if len(some[0].texts) > 1 else None
        whole = tokenizer(texts, pairs, verbose=False)
        cut = tokenizer(texts, pairs, verbose=False, truncation=True, max_length=max_length)
        types = cut.get("token_type_ids") or [()] * len(some)
        told = zip(some, whole["input_ids"], cut["input_ids"], types, strict=True)
        for record, full, ids, kinds in told:
            if not ids:
                problems.append(Problem(record.row, "error", "no_tokens", "no token is left", "Write text."))
                continue
            kinds = tuple(kinds) if any(kinds) else ()
            target = _target(record, labels)
            rows.append(LabelledRow(tuple(ids), kinds, target, record, len(ids) < len(full)))
    return tuple(rows), tuple(problems)


def _target(record: Labelled, labels: Sequence[str]) -> tuple[float, ...]:
    if record.number is not None:
        return (record.number,)
    return tuple(float(label in record.labels) for label in labels)


def encode_tagged(
    records: Sequence[Tagged], tokenizer: Any, max_length: int, labels: Sequence[str]
) -> tuple[tuple[TaggedRow, ...], tuple[Problem, ...]]:
    """Rows with token ids; words are joined by spaces, and each is told at its first token. Words beyond
    `max_length` are left out."""
    numbers = {label: number for number, label in enumerate(labels)}
    rows: list[TaggedRow] = []
    problems: list[Problem] = []
    for record in records:
        encoded = tokenizer(
            record.text, verbose=False, truncation=True, max_length=max_length, return_offsets_mapping=True
        )
        targets, told = _at_words(record, encoded["offset_mapping"], numbers)
        if not told:
            problems.append(Problem(record.row, "error", "no_tokens", "no word is left", "Write words."))
            continue
        rows.append(TaggedRow(tuple(encoded["input_ids"]), targets, record, told < len(record.words)))
    return tuple(rows), tuple(problems)


def _at_words(
    record: Tagged, spans: Sequence[tuple[int, int]], numbers: dict[str, int]
) -> tuple[tuple[int, ...], int]:
    """A label for each token, and how many words got one."""
    labels = [IGNORED] * len(spans)
    place, start, told = 0, 0, 0
    for word, tag in zip(record.words, record.tags, strict=True):
        while place < len(spans) and (spans[place][1] <= start or spans[place][0] == spans[place][1]):
            place += 1
        if place < len(spans) and spans[place][0] < start + len(word) and labels[place] == IGNORED:
            labels[place] = numbers[tag]
            told += 1
        start += len(word) + 1
    return tuple(labels), told


def collate_labelled(rows: Sequence[LabelledRow], pad: int, most: int, told: Told) -> LabelledBatch:
    """Rows padded on the right, never wider than `most`. `told`: what `targets` are."""
    inputs, width = _padded([row.input_ids for row in rows], pad, most)
    if any(row.types for row in rows):
        filled = [[*(row.types or [0] * row.tokens), *[0] * (width - row.tokens)] for row in rows]
        inputs["token_type_ids"] = torch.tensor(filled)
    labels = torch.full((len(rows), width), IGNORED)
    for line, row in enumerate(rows):
        labels[line, row.tokens - 1] = 0
    values = torch.tensor([row.target for row in rows], dtype=torch.float32)
    targets = {"one label": values.argmax(1), "number": values[:, 0]}.get(told, values)
    plain = _batch(inputs, labels, rows, len(rows))
    return LabelledBatch(**{**vars(plain), "targets": targets})


def collate_tagged(rows: Sequence[TaggedRow], pad: int, most: int) -> Batch:
    """Rows padded on the right, never wider than `most`, with a label at the first token of every word."""
    inputs, width = _padded([row.input_ids for row in rows], pad, most)
    labels = torch.tensor([[*row.labels, *[IGNORED] * (width - row.tokens)] for row in rows])
    return _batch(inputs, labels, rows, sum(row.target_tokens for row in rows))


def _padded(rows: Sequence[Sequence[int]], pad: int, most: int) -> tuple[dict[str, Tensor], int]:
    width = min(-(-max(map(len, rows)) // WIDTH) * WIDTH, most)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}, width


def _batch(
    inputs: dict[str, Tensor], labels: Tensor, rows: Sequence[LabelledRow | TaggedRow], targets: int
) -> Batch:
    lengths = [row.tokens for row in rows]
    numbers = tuple(row.row for row in rows)
    return Batch(inputs, labels, targets, sum(lengths), numbers, tuple((length,) for length in lengths))
