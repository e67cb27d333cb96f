"""A batch in the form that an attention implementation reads: with a mask, or flat and without padding."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, chain
from typing import TypeVar, cast

import torch
from torch import Tensor

from graftlm.data.batches import Batch
from graftlm.data.branches import BranchBatch, apart

DOCUMENTS = "graft"
"""The name under which `transformers` knows attention that is told where each document starts."""
PARENTS = "graft_parents"
"""The argument that tells it which document each one continues."""


B = TypeVar("B", bound=Batch)


def for_attention(batch: B, implementation: str, dtype: torch.dtype) -> B:
    """The batch as this attention implementation of `transformers` needs it.

    `graft` gets one row of real tokens, and where in it each document starts. `sdpa` gets a boolean 4-D mask
    for packed windows, `eager` an additive one (0 or the smallest number of `dtype`), every other none: it
    finds the documents by `position_ids`. Padded rows have their 2-D mask already and are returned unchanged
    by all but `graft`; so is a batch that does not say its documents. Documents that continue another become
    whole ones (`data.branches.apart`) where neither `graft` nor a mask can show them their parent.

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
    if "attention_mask" in batch.inputs:
        return batch
    if implementation not in ("sdpa", "eager"):
        return cast(B, apart(batch)) if isinstance(batch, BranchBatch) else batch
    mask = document_mask(batch)
    if implementation == "eager":
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return replace(batch, inputs={**batch.inputs, "attention_mask": mask})


def flat(batch: B) -> B:
    """All documents in one row, without padding, in their order.

    `inputs`: input_ids and position_ids [1, tokens], the latter from 0 in each document or on from its
    parent's end, and where each document starts and the last one ends: cu_seq_lens_q [documents + 1], int64
    on the CPU, and for an accelerator cu_seq_lens_k, the same in int32 there, so that nobody waits for it.
    Where documents have parents, graft_parents [documents], int64 on the CPU, says which.
    """
    ids = batch.inputs["input_ids"]
    lengths = torch.tensor([*chain.from_iterable(batch.documents)])
    starts = torch.tensor([0, *accumulate(lengths.tolist())])
    first = -starts[:-1]
    flattened, more = batch, dict[str, Tensor]()
    if isinstance(batch, BranchBatch):
        offsets = accumulate(map(len, batch.documents), initial=0)
        above = tuple(
            parent if parent < 0 else offset + parent
            for offset, line in zip(offsets, batch.parents, strict=False)
            for parent in line
        )
        if max(above) >= 0:
            more[PARENTS] = torch.tensor(above)
            first = first + torch.where(more[PARENTS] < 0, 0, lengths[more[PARENTS]])
        flattened = replace(batch, documents=(tuple(lengths.tolist()),), parents=(above,))
    positions = torch.arange(int(starts[-1])) + first.repeat_interleave(lengths)
    inputs = {
        "input_ids": _real(ids, batch),
        "position_ids": positions.unsqueeze(0).to(ids.device, non_blocking=True),
        "cu_seq_lens_q": starts,
        **more,
    }
    if ids.device.type != "cpu":
        inputs["cu_seq_lens_k"] = starts.to(ids.device, torch.int32, non_blocking=True)
    return replace(flattened, inputs=inputs, labels=_real(batch.labels, batch))


def document_mask(batch: Batch) -> Tensor:
    """A boolean mask [B, 1, T, T], True where a query (row) may attend to a key (column).

    Causal and block-diagonal, but for a document that continues another and sees that one too; padding
    attends to itself only, so that no row of a softmax is empty.
    """
    ids = batch.inputs["input_ids"]
    rows, width = ids.shape
    # The number of the document of each token; padding gets numbers of its own, one per token.
    owner = torch.arange(width).neg().sub(1).repeat(rows, 1)
    above = owner.clone()
    parents = batch.parents if isinstance(batch, BranchBatch) else [()] * rows
    for line, seen, lengths, of_line in zip(owner, above, batch.documents, parents, strict=True):
        numbers = torch.arange(len(lengths))
        counts, tokens = torch.tensor(lengths), sum(lengths)
        line[:tokens] = numbers.repeat_interleave(counts)
        continued = torch.tensor(of_line) if of_line else numbers
        seen[:tokens] = torch.where(continued < 0, numbers, continued).repeat_interleave(counts)
    owner, above = (each.to(ids.device, non_blocking=True) for each in (owner, above))
    same = owner.unsqueeze(2) == owner.unsqueeze(1)
    if isinstance(batch, BranchBatch):
        same |= above.unsqueeze(2) == owner.unsqueeze(1)
    return same.tril_().unsqueeze(1)


def _real(values: Tensor, batch: Batch) -> Tensor:
    """The real tokens of [B, T], one row after the other: [1, tokens]."""
    pairs = zip(values, batch.documents, strict=True)
    return torch.cat([line[: sum(lengths)] for line, lengths in pairs]).unsqueeze(0)
