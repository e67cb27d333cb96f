"""What an objective is: a loss over a model and a batch, summed and counted, never averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor, nn

from graftlm.data.batches import Batch

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class LossParts:
    """The sum of a batch's losses and how many targets it covers: tokens, rows or pairs.

    The training step divides by the targets of the whole window of micro-batches, so an objective must not.
    """

    loss_sum: Tensor
    """Scalar, float32 (float64 for a model in float64), with gradient."""
    target_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over the targets of this batch, for the live view and the event log."""


class Objective(ABC, Generic[B]):
    """Batch in, loss out."""

    path: str = "the model's own loss path"
    """How the loss is formed on this model."""
    why: str = ""
    """Why it is formed so."""
    tokens: int = 0
    """What flat batches are filled up to at least (`data.filled`)."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: B) -> LossParts:
        """The loss of one micro-batch, whose `inputs` are on the model's device and all else on the host."""

    @abstractmethod
    def probe(self, length: int) -> B:
        """A batch of about `length` tokens with targets, on the host: what a step keeps is counted on it."""
