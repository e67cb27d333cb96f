"""Token classification: cross-entropy of the tag of every word, told at its first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.config import Config
from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED
from graftlm.data.labels.encode import TaggedRow, collate_tagged
from graftlm.data.labels.records import Tagged
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.classification import FEW, ClassificationSettings, as_labels
from graftlm.objectives.row_logits import RowLogits


class TokenClassificationSettings(Config):
    """What is told of a word."""

    aliases: ClassVar[Mapping[str, str]] = {**ClassificationSettings.aliases, "tags": "labels"}

    labels: tuple[str, ...] = ()
    """All tags in order, or the file that names them; none: those of the data. The recipe of a run names them
    all."""

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return as_labels(value)


class TokenClassificationObjective(Objective[Batch]):
    """Sum over labelled tokens of -log p(tag), and their number."""

    def __init__(self, model: nn.Module, *, longest: int = 128) -> None:
        """`longest`: tokens of the longest row."""
        self.longest = longest
        self.logits = RowLogits(model)
        self.path, self.why = self.logits.path, self.logits.why

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        logits = self.logits(model, batch, self.tokens)
        return LossParts(token_losses(logits, batch.labels).sum(), batch.target_tokens)

    def probe(self, length: int) -> Batch:
        """Rows of the longest kind, as many as it takes, with a label on every token."""
        tokens = min(self.longest, length)
        ids = tuple(number % FEW for number in range(tokens))
        row = TaggedRow(ids, (0,) * tokens, Tagged(("",), ("",), 0), False)
        return collate_tagged([row] * max(1, round(length / tokens)), 0, tokens)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(tag) of every labelled token, in at least float32. Shapes: logits [N, tags] of the tokens whose
    `labels` [B, T] are not -100, in their order; [N]."""
    targets = labels[labels != IGNORED].to(logits.device, non_blocking=True)
    return F.cross_entropy(logits.float(), targets, reduction="none")
