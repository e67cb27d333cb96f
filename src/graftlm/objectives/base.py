"""What an objective is: a loss over a model and a batch, summed and counted, never averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from graftlm.data.batches import Batch


@dataclass(frozen=True)
class LossParts:
    """The sum of a batch's losses and how many target tokens it covers.

    The training step divides by the tokens of the whole accumulation window, so an objective must not divide.
    """

    loss_sum: Tensor
    """Scalar, float32 (float64 for a model in float64), with gradient."""
    target_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """Batch in, loss out."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts: ...
