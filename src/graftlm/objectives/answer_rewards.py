"""One number for each answer to a prompt: what a head says of the answer's last token.

A prompt is computed once for all its answers where the model's attention takes documents; every other model
reads each answer behind a copy of its prompt.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from graftlm.data.batches import Batch
from graftlm.data.branches import BranchBatch, apart
from graftlm.data.encode import IGNORED
from graftlm.data.forms import DOCUMENTS
from graftlm.objectives.row_logits import RowLogits
from graftlm.objectives.sft import attention_of


class AnswerRewards:
    """The rewards of the answers in a batch, by a model that gives one number for a row."""

    def __init__(self, model: nn.Module) -> None:
        self.logits = RowLogits(model)
        self.path, self.why = self.logits.path, self.logits.why

    def __call__(self, model: nn.Module, batch: BranchBatch, tokens: int = 0) -> Tensor:
        """In the order of the batch: [A], float32 or better. `tokens`: what flat batches are filled up to."""
        marked = ends_marked(batch)
        is_shared = self.logits.head and attention_of(model) == DOCUMENTS
        rewards = self.logits(model, marked if is_shared else rows_of(marked), tokens).squeeze(-1)
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def ends_marked(batch: BranchBatch) -> BranchBatch:
    """The batch with a label on the last token of each answer, and nowhere else.

    Raises:
        ValueError: an answer is empty.
    """
    labels = torch.full_like(batch.labels, IGNORED)
    for line, lengths, parents in zip(labels, batch.documents, batch.parents, strict=True):
        for length, stop, parent in zip(lengths, accumulate(lengths), parents, strict=True):
            if parent >= 0 and not length:
                raise ValueError("an empty answer has no last token to read a reward from")
            if parent >= 0:
                line[stop - 1] = 0
    return replace(batch, labels=labels)


def rows_of(batch: BranchBatch) -> Batch:
    """Each answer behind its prompt, in a row of its own."""
    found = apart(batch)
    plain = Batch(found.inputs, found.labels, found.target_tokens, found.real_tokens, found.rows)
    return replace(plain, documents=found.documents)
