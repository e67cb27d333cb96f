"""A batch in tensors whose shapes repeat: what is recorded once for a shape and played again needs them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED
from graftlm.data.filled import filled

PARTS = 8
"""Label rows come in eighths of the tokens."""
DOCUMENTS = 8
"""Fewest documents of a shape; more of them in powers of two."""

Shape = tuple[int, int, int]
"""Tokens, documents, rows with a label."""


@dataclass(frozen=True)
class Fixed:
    """A flat batch, filled up in all of its sizes.

    inputs: of the model, `input_ids` and `position_ids` [1, tokens], where the documents start and the last
    one ends [documents + 1]: documents that are not there are empty ones at the end. index, targets: [rows],
    the tokens that something is predicted from, and what; rows that are not there have a target below 0.
    """

    inputs: dict[str, Tensor]
    index: Tensor
    targets: Tensor

    @property
    def shape(self) -> Shape:
        """What must be the same for two batches to be computed by one recording."""
        return self.inputs["input_ids"].shape[1], len(self.inputs["cu_seq_lens_q"]) - 1, len(self.index)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {**self.inputs, "index": self.index, "targets": self.targets}


def fixed(batch: Batch, tokens: int) -> Fixed:
    """The flat batch (`data.forms.flat`) in a shape for `tokens` tokens.

    Labels lie on the host, so that the rows are counted there; index and targets go where the ids are.

    >>> import torch
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> inputs = {"input_ids": ids, "position_ids": ids - 5, "cu_seq_lens_q": torch.tensor([0, 3])}
    >>> found = fixed(Batch(inputs, torch.tensor([[-100, 6, 7]]), 2, 3, (1,)), 16)
    >>> found.shape, found.index.tolist(), found.targets.tolist()
    ((16, 8, 2), [0, 1], [6, 7])
    """
    batch = filled(batch, tokens)
    device = batch.inputs["input_ids"].device
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
    rows = (labels != IGNORED).nonzero().flatten()
    missing = -len(rows) % max(1, tokens // PARTS)
    index, targets = F.pad(rows, (0, missing)), F.pad(labels[rows], (0, missing), value=IGNORED)
    documents = len(batch.inputs["cu_seq_lens_q"]) - 1
    empty = max(DOCUMENTS, 1 << (documents - 1).bit_length()) - documents
    inputs = {
        name: F.pad(value, (0, empty), value=batch.labels.shape[1])
        if name.startswith("cu_seq_lens")
        else value
        for name, value in batch.inputs.items()
    }
    return Fixed(inputs, *(each.to(device, non_blocking=True) for each in (index, targets)))
