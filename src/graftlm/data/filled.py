"""Flat batches of one fixed number of tokens: what is compiled or captured for a shape needs one shape."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch.nn import functional as F

from graftlm.data.batches import WIDTH_STEP, Batch
from graftlm.data.encode import IGNORED
from graftlm.data.forms import PARENTS

B = TypeVar("B", bound=Batch)


def filled(batch: B, tokens: int) -> B:
    """The flat batch with padding as one last document, so that it has `tokens` tokens; as it is if it has.

    Nothing looks at padding, and it has no label: loss and gradients are the same, its arithmetic is wasted.

    >>> ids = torch.tensor([[5, 6]])
    >>> inputs = {"input_ids": ids, "position_ids": ids - 5, "cu_seq_lens_q": torch.tensor([0, 2])}
    >>> wide = filled(Batch(inputs, ids, 2, 2, (1,)), 5)
    >>> wide.inputs["cu_seq_lens_q"].tolist(), wide.inputs["position_ids"].tolist(), wide.labels.tolist()
    ([0, 2, 5], [[0, 1, 0, 1, 2]], [[5, 6, -100, -100, -100]])
    """
    starts = batch.inputs.get("cu_seq_lens_q")
    missing = tokens - batch.labels.shape[1]
    if starts is None or missing <= 0:
        return batch
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    # Few positions: padding may be longer than the context of a model that has a table of them.
    behind = torch.arange(missing, device=positions.device).remainder_(WIDTH_STEP).unsqueeze(0)
    inputs = {
        **batch.inputs,
        "input_ids": F.pad(ids, (0, missing)),
        "position_ids": torch.cat([positions, behind.to(positions.dtype)], dim=1),
    }
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in batch.inputs:
            inputs[name] = F.pad(batch.inputs[name], (0, 1), value=tokens)
    if PARENTS in batch.inputs:
        inputs[PARENTS] = F.pad(batch.inputs[PARENTS], (0, 1), value=-1)
    return replace(batch, inputs=inputs, labels=F.pad(batch.labels, (0, missing), value=IGNORED))
