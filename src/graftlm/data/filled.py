"""Flat batches of one fixed number of tokens: what is compiled or captured for a shape needs one shape."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED


def filled(batch: Batch, tokens: int) -> Batch:
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
    behind = torch.arange(missing, device=positions.device).unsqueeze(0)
    inputs = {
        **batch.inputs,
        "input_ids": F.pad(ids, (0, missing)),
        "position_ids": torch.cat([positions, behind.to(positions.dtype)], dim=1),
    }
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in batch.inputs:
            inputs[name] = F.pad(batch.inputs[name], (0, 1), value=tokens)
    return replace(batch, inputs=inputs, labels=F.pad(batch.labels, (0, missing), value=IGNORED))
