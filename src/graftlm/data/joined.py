"""Micro-batches of several runs as one, their rows one below the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED

B = TypeVar("B", bound=Batch)


def joined(batches: Sequence[B]) -> B:
    """One batch with the rows of all, in order, padded to the widest.

    All have the same inputs, but that kinds of tokens which are all 0 may be left out. What a kind of batch
    has besides is put together too: tensors along their first axis, tuples end to end, counts as sums.

    >>> ids = torch.tensor([[5, 6]])
    >>> one = Batch({"input_ids": ids}, ids, 2, 2, (1,), ((2,),))
    >>> both = joined([one, Batch({"input_ids": ids[:, :1]}, ids[:, :1], 1, 1, (7,), ((1,),))])
    >>> both.inputs["input_ids"].tolist(), both.labels.tolist(), both.rows, both.documents
    ([[5, 6], [5, 0]], [[5, 6], [5, -100]], (1, 7), ((2,), (1,)))
    """
    if len(batches) == 1:
        return batches[0]
    width = max(batch.labels.shape[1] for batch in batches)
    inputs = {
        name: torch.cat([_as_wide(_input(batch, name), width, 0) for batch in batches])
        for name in dict.fromkeys(chain.from_iterable(batch.inputs for batch in batches))
    }
    labels = torch.cat([_as_wide(batch.labels, width, IGNORED) for batch in batches])
    return dataclasses.replace(batches[0], inputs=inputs, labels=labels, **_rest(batches))


def beside(flat: Sequence[B]) -> B:
    """One flat batch (`data.forms.flat`) with the tokens of all, one after the other.

    >>> ids, starts = torch.tensor([[5, 6]]), torch.tensor([0, 2])
    >>> one = Batch({"input_ids": ids, "cu_seq_lens_q": starts}, ids, 2, 2, (1,), ((2,),))
    >>> both = beside([one, one])
    >>> both.inputs["input_ids"].tolist(), both.inputs["cu_seq_lens_q"].tolist()
    ([[5, 6, 5, 6]], [0, 2, 4])
    """
    if len(flat) == 1:
        return flat[0]
    before = [0, *accumulate(batch.labels.shape[1] for batch in flat)]
    inputs = {}
    for name in flat[0].inputs:
        values = [batch.inputs[name] for batch in flat]
        if name.startswith("cu_seq_lens"):  # the first of each is where the one before it ended
            moved = [value[1:] + start for value, start in zip(values, before, strict=False)]
            inputs[name] = torch.cat([values[0][:1], *moved])
        else:
            inputs[name] = torch.cat(values, dim=1)
    labels = torch.cat([batch.labels for batch in flat], dim=1)
    return dataclasses.replace(flat[0], inputs=inputs, labels=labels, **_rest(flat))


def _input(batch: Batch, name: str) -> Tensor:
    if name == "token_type_ids" and name not in batch.inputs:
        return torch.zeros_like(batch.inputs["input_ids"])
    return batch.inputs[name]


def _as_wide(values: Tensor, width: int, fill: int) -> Tensor:
    """Shapes: [B, T] -> [B, width]."""
    return F.pad(values, (0, width - values.shape[1]), value=fill)


def _rest(batches: Sequence[Batch]) -> dict[str, Any]:
    """What is neither inputs nor labels, of all."""
    names = [field.name for field in dataclasses.fields(batches[0])]
    return {
        name: _together([getattr(batch, name) for batch in batches])
        for name in names
        if name not in ("inputs", "labels")
    }


def _together(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if isinstance(values[0], tuple):
        return tuple(chain.from_iterable(values))
    return sum(values)
