"""Classification and regression: what a head says of rows, against what their labels say.

One label of several: cross-entropy. Any number of labels: binary cross-entropy, the mean over the labels. A
number: the squared error. All as `transformers` computes them for its own heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.config import Config
from graftlm.core.errors import ConfigError
from graftlm.data.labels.encode import LabelledBatch, LabelledRow, collate_labelled
from graftlm.data.labels.records import Labelled
from graftlm.data.labels.values import Problem
from graftlm.methods.lanes import Lanes
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.row_logits import RowLogits

FEW = 16
"""Different tokens in a probe; any vocabulary has as many."""


class ClassificationSettings(Config):
    """What is told of a row."""

    aliases: ClassVar[Mapping[str, str]] = {
        "label_map": "labels",
        "label_list": "labels",
        "id2label": "labels",
        "label_names": "labels",
        "label_smoothing_factor": "label_smoothing",
        "problem": "problem_type",
    }

    problem_type: Literal[
        "auto", "single_label_classification", "multi_label_classification", "regression"
    ] = "auto"
    """One label of several, any number of them, or a number; `auto` tells by the data."""
    labels: tuple[str, ...] = ()
    """All labels in order, or the file that names them (a JSON list, or a name on every line); none: those of
    the data. The recipe of a run names them all."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the probability that training spreads over all labels (Szegedy et al. 2016)."""

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return as_labels(value)


def as_labels(value: object) -> object:
    """Labels as a recipe writes them: a lone text names a file, whole numbers are names too.

    Raises:
        ValueError: YAML read a name as true or false.

    >>> as_labels([0, 1]), as_labels("labels.txt")
    (('0', '1'), ('labels.txt',))
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        return value
    if any(isinstance(each, bool) for each in value):
        raise ValueError("YAML reads yes, no, on and off as true and false; write such labels in quotes")
    return tuple(str(each) if isinstance(each, int) else each for each in value)


def require_matching(told: Problem, label_smoothing: float) -> None:
    """Refuse a setting that has no meaning for what is told.

    Raises:
        ConfigError: label smoothing where labels are not exclusive.
    """
    if label_smoothing and told != "one label":
        raise ConfigError(
            f"task.label_smoothing has no effect where {told} is told of a row.",
            meaning="It spreads the probability of one label over all of them.",
            fix="Leave it out, or set task.problem_type=single_label_classification.",
        )


class ClassificationObjective(Objective[LabelledBatch]):
    """Sum over rows of the loss of what the head says, and the number of rows."""

    def __init__(
        self, model: nn.Module, told: Problem, *, label_smoothing: float = 0.0, longest: int = 128
    ) -> None:
        """`longest`: tokens of the longest row."""
        self.told, self.smoothing, self.longest = told, label_smoothing, longest
        self.logits = RowLogits(model)
        self.path, self.why = self.logits.path, self.logits.why

    def __call__(self, model: nn.Module, batch: LabelledBatch) -> LossParts:
        logits = self.logits(model, batch, self.tokens)
        return self._parts(logits, batch)

    def together(
        self, model: nn.Module, batches: Mapping[str, LabelledBatch], lanes: Lanes
    ) -> dict[str, LossParts]:
        """As `TogetherObjective`."""
        found = self.logits.together(model, batches, lanes)
        return {name: self._parts(found[name], batch) for name, batch in batches.items()}

    def _parts(self, logits: Tensor, batch: LabelledBatch) -> LossParts:
        losses = row_losses(logits, batch.targets, self.told, label_smoothing=self.smoothing)
        return LossParts(losses.sum(), batch.target_tokens)

    def probe(self, length: int) -> LabelledBatch:
        """Rows of the longest kind, as many as it takes."""
        tokens = min(self.longest, length)
        ids = tuple(number % FEW for number in range(tokens))
        record = Labelled(("",), (), 0)
        row = LabelledRow(ids, (), (1.0,), record, False)
        count = max(1, round(length / tokens))
        batch = collate_labelled([row] * count, 0, tokens, "number")
        if self.told == "number":
            return batch
        several = self.told == "several labels"
        targets = torch.zeros(count, 1) if several else torch.zeros(count, dtype=torch.long)
        return LabelledBatch(**{**vars(batch), "targets": targets})


def row_losses(logits: Tensor, targets: Tensor, told: Problem, *, label_smoothing: float = 0.0) -> Tensor:
    """Loss of every row, in at least float32. Shapes: logits [R, labels], targets as in `LabelledBatch`; [R].

    >>> row_losses(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), "one label")
    tensor([0.6931])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.device, non_blocking=True)
    if told == "one label":
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if told == "number":
        return F.mse_loss(logits.squeeze(-1), targets.to(logits.dtype), reduction="none")
    wanted = targets.to(logits.dtype).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(-1)
