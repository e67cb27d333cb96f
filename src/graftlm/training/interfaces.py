"""What the training loop needs from others, as structural types: no import of data or objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn


class Batch(Protocol):
    """A dataclass of tensors and counts, made on the CPU (`graftlm.data.batches.Batch`)."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def inputs(self) -> Mapping[str, Tensor]: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def target_tokens(self) -> int: ...
    @property
    def real_tokens(self) -> int: ...
    @property
    def rows(self) -> tuple[int, ...]: ...


B = TypeVar("B", bound=Batch)
BatchOut = TypeVar("BatchOut", bound=Batch, covariant=True)
BatchIn = TypeVar("BatchIn", bound=Batch, contravariant=True)


class BatchSource(Protocol[BatchOut]):
    """Micro-batches as a pure function of (epoch, index): nothing to save but two integers."""

    @property
    def fingerprint(self) -> str: ...
    def count(self, epoch: int, /) -> int: ...
    def batch(self, epoch: int, index: int, /) -> BatchOut: ...


class LossParts(Protocol):
    """Sum of the loss over target tokens, their number, and figures to log."""

    @property
    def loss_sum(self) -> Tensor: ...
    @property
    def target_tokens(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


class Objective(Protocol[BatchIn]):
    """One micro-batch in, its loss out."""

    def __call__(self, model: nn.Module, batch: BatchIn, /) -> LossParts: ...


@dataclass(frozen=True)
class HeldOut:
    """Result of one evaluation: mean loss over `tokens` target tokens of `rows` held-out rows."""

    loss: float
    tokens: int
    rows: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the task is judged by besides: shown live, kept in the log, drawn in the report."""


StopAsked = Callable[[], bool]
"""Whether somebody asked the run to stop; cheap, to be polled often."""

Evaluate = Callable[[StopAsked], HeldOut | None]
"""Evaluates the model as it is; polls and returns None if it was asked to stop half-way."""


EnterPhase = Callable[[str], None]
"""Told the name of each phase as it begins, by what measures memory."""


def not_measured(phase: str) -> None:
    """The `EnterPhase` of who does not measure."""


class OptimSettings(Protocol):
    """What the optimizer and the schedule read; `graftlm.training.recipe.TrainSection` has all of it."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def lr_scheduler_type(self) -> str: ...
    @property
    def warmup_ratio(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def loraplus_lr_ratio(self) -> float | None: ...
    @property
    def optim(self) -> str: ...


class TrainSettings(OptimSettings, Protocol):
    """What the loop reads. Counts of steps are optimizer steps; None or 0 means never (or no limit)."""

    @property
    def num_train_epochs(self) -> float: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def gradient_accumulation_steps(self) -> int: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def save_steps(self) -> int | None: ...
    @property
    def save_total_limit(self) -> int: ...
    @property
    def eval_steps(self) -> int | None: ...
    @property
    def early_stopping_patience(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
