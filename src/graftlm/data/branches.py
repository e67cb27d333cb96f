"""Rows with one prompt and several answers to it: the prompt is there once, and every answer sees it.

A preference pair is a prompt with two answers, a group of rollouts one with many. Laid out as
`[prompt | answer 1 | answer 2 ...]` the prompt is computed once, forward and backward, not once an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from graftlm.core.errors import DataError
from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED


@dataclass(frozen=True, slots=True)
class Branched:
    """A prompt and the answers to it, in tokens.

    row: its number in the data. truncated: something was cut off to fit a length. The prompt has a token at
    least: the first token of each answer is predicted from its last. An answer may be empty.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    row: int
    truncated: bool

    @property
    def tokens(self) -> int:
        """Of the prompt, once, and of all answers."""
        return len(self.prompt) + self.target_tokens

    @property
    def target_tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))


@dataclass(frozen=True)
class BranchBatch(Batch):
    """A batch whose documents continue others.

    parents: beside `documents`, the index in its line of the document that each one continues, -1 for none.
    A document sees the whole of its parent, which has none itself, and stands in front of it. Positions go on
    behind the parent's.
    """

    parents: tuple[tuple[int, ...], ...] = ()


def branch_batch(rows: Sequence[Branched], pad: int) -> BranchBatch:
    """One line for each row: its prompt, then its answers; the answers are what is learnt.

    Shapes: input_ids, position_ids and labels [rows, longest row], padded with `pad` and, labels, with -100.
    `target_tokens` counts the tokens of all answers.

    Raises:
        DataError: prompts without a token, by their row numbers.

    >>> batch = branch_batch([Branched((5, 6), ((7,), (8, 9)), row=1, truncated=False)], pad=0)
    >>> batch.inputs["input_ids"].tolist(), batch.inputs["position_ids"].tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]])
    >>> batch.labels.tolist(), batch.documents, batch.parents
    ([[-100, -100, 7, 8, 9]], ((2, 1, 2),), ((-1, 0, 0),))
    """
    without = [row.row for row in rows if not row.prompt]
    if without:
        raise DataError(
            f"{len(without)} of {len(rows)} rows have an empty prompt.",
            meaning="The first token of an answer is predicted from the last token of its prompt.",
            fix="Begin each prompt with the tokenizer's begin-of-text token, or leave these rows out.",
            problems=[f"row {row}" for row in without],
        )
    shape = (len(rows), max(row.tokens for row in rows))
    ids = torch.full(shape, pad, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    for line, row in enumerate(rows):
        start = 0
        for number, document in enumerate((row.prompt, *row.answers)):
            stop = start + len(document)
            before = len(row.prompt) if number else 0
            ids[line, start:stop] = torch.tensor(document, dtype=torch.long)
            positions[line, start:stop] = torch.arange(before, before + len(document))
            if number:
                labels[line, start:stop] = ids[line, start:stop]
            start = stop
    return BranchBatch(
        {"input_ids": ids, "position_ids": positions},
        labels,
        target_tokens=sum(row.target_tokens for row in rows),
        real_tokens=sum(row.tokens for row in rows),
        rows=tuple(row.row for row in rows),
        documents=tuple((len(row.prompt), *map(len, row.answers)) for row in rows),
        parents=tuple((-1, *(0 for _ in row.answers)) for row in rows),
    )


def apart(batch: BranchBatch) -> BranchBatch:
    """Every answer behind a copy of its prompt, in a row of its own, padded on the right.

    For models that can see no part of a row but what stands before: recurrent ones, or attention without a
    mask of one's own. Shapes: input_ids, attention_mask and labels [answers, longest row].

    >>> batch = apart(branch_batch([Branched((5, 6), ((7,), (8, 9)), row=1, truncated=False)], pad=0))
    >>> batch.inputs["input_ids"].tolist(), batch.labels.tolist()
    ([[5, 6, 7, 0], [5, 6, 8, 9]], [[-100, -100, 7, -100], [-100, -100, 8, 9]])
    """
    ids, labels = [], []
    pairs = zip(batch.inputs["input_ids"], batch.labels, strict=True)
    for (tokens, targets), lengths, parents in zip(pairs, batch.documents, batch.parents, strict=True):
        starts = accumulate(lengths, initial=0)
        parts = [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]
        for part, parent in zip(parts, parents, strict=True):
            if parent >= 0:
                ids.append(torch.cat([tokens[parts[parent]], tokens[part]]))
                labels.append(torch.cat([targets[parts[parent]], targets[part]]))
    real = [torch.ones_like(row) for row in ids]
    return replace(
        batch,
        inputs={
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence(real, batch_first=True),
        },
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        documents=tuple((len(row),) for row in ids),
        parents=((-1,),) * len(ids),
    )


def sources(batch: BranchBatch) -> Tensor:
    """Where each labelled token is predicted from: the token before it, or the last one of its parent.

    Indices into the tokens of all lines of `batch`, one after another, on the host; as many as labels, in
    their order. Shape: [N].

    >>> batch = branch_batch([Branched((5, 6), ((7,), (8, 9)), row=1, truncated=False)], pad=0)
    >>> sources(batch).tolist()
    [1, 1, 3]
    """
    before = torch.arange(batch.labels.numel()) - 1
    for line, (lengths, parents) in enumerate(zip(batch.documents, batch.parents, strict=True)):
        starts = [line * batch.labels.shape[1] + start for start in accumulate(lengths, initial=0)]
        for start, length, parent in zip(starts, lengths, parents, strict=False):
            if parent >= 0 and length:
                before[start] = starts[parent] + lengths[parent] - 1
    return before[batch.labels.flatten() != IGNORED]
