"""A batch in the form that an attention implementation reads: with a mask, or flat and without padding."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from graftlm.data.batches import Batch

DOCUMENTS = "graft"
"""The name under which `transformers` knows attention that is told where each document starts."""


def for_attention(batch: Batch, implementation: str, dtype: torch.dtype) -> Batch:
    """The batch as this attention implementation of `transformers` needs it.

    `graft` gets one row of real tokens, and where in it each document starts. `sdpa` gets a boolean 4-D mask
    for packed windows, `eager` an additive one (0 or the smallest number of `dtype`), every other none: it
    finds the documents by `position_ids`. Padded rows have their 2-D mask already and are returned unchanged
    by all but `graft`; so is a batch that does not say its documents.

    >>> ids = torch.tensor([[5, 6, 7, 0]])
    >>> batch = Batch({"input_ids": ids}, ids, 3, 3, (1, 2), documents=((2, 1),))
    >>> inputs = for_attention(batch, "graft", torch.float32).inputs
    >>> inputs["input_ids"].tolist(), inputs["cu_seq_lens_q"].tolist()
    ([[5, 6, 7]], [0, 2, 3])
    """
    if not batch.documents:
        return batch
    if implementation == DOCUMENTS:
        return flat(batch)
    if "attention_mask" in batch.inputs or implementation not in ("sdpa", "eager"):
        return batch
    mask = document_mask(batch)
    if implementation == "eager":
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return replace(batch, inputs={**batch.inputs, "attention_mask": mask})


def flat(batch: Batch) -> Batch:
    """All documents in one row, without padding, in their order.

    `inputs`: input_ids and position_ids [1, tokens], the latter from 0 in each document, and where each
    document starts and the last one ends: cu_seq_lens_q [documents + 1], int64 on the CPU, and for an
    accelerator cu_seq_lens_k, the same in int32 there, so that nobody waits for it.
    """
    ids = batch.inputs["input_ids"]
    lengths = torch.tensor([*chain.from_iterable(batch.documents)])
    starts = torch.tensor([0, *accumulate(lengths.tolist())])
    positions = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths)
    inputs = {
        "input_ids": _real(ids, batch),
        "position_ids": positions.unsqueeze(0).to(ids.device, non_blocking=True),
        "cu_seq_lens_q": starts,
    }
    if ids.device.type != "cpu":
        inputs["cu_seq_lens_k"] = starts.to(ids.device, torch.int32, non_blocking=True)
    return replace(batch, inputs=inputs, labels=_real(batch.labels, batch))


def document_mask(batch: Batch) -> Tensor:
    """A boolean mask [B, 1, T, T], True where a query (row) may attend to a key (column).

    Causal and block-diagonal; padding attends to itself only, so that no row of a softmax is empty.
    """
    ids = batch.inputs["input_ids"]
    rows, width = ids.shape
    # The number of the document of each token; padding gets numbers of its own, one per token.
    owner = torch.arange(width).neg().sub(1).repeat(rows, 1)
    for line, lengths in zip(owner, batch.documents, strict=True):
        line[: sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    owner = owner.to(ids.device, non_blocking=True)
    return (owner.unsqueeze(2) == owner.unsqueeze(1)).tril_().unsqueeze(1)


def _real(values: Tensor, batch: Batch) -> Tensor:
    """The real tokens of [B, T], one row after the other: [1, tokens]."""
    pairs = zip(values, batch.documents, strict=True)
    return torch.cat([line[: sum(lengths)] for line, lengths in pairs]).unsqueeze(0)
