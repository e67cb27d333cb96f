"""What a task is: everything about a run that depends on what is learnt, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import nn

from graftlm.core.notices import notice
from graftlm.data.batches import Batch
from graftlm.evaluation.rows import TokenRow
from graftlm.evaluation.runner import Evaluation
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import MethodConfig
from graftlm.models.ending import TEXT, Ending
from graftlm.models.generate import Progress, StopFlag
from graftlm.objectives.base import Objective
from graftlm.tasks.dataset import Dataset, Row
from graftlm.training.interfaces import BatchOut, BatchSource, Evaluate
from graftlm.training.recipe import Recipe

B = TypeVar("B", bound=Batch)


class TaskBatches(BatchSource[BatchOut], Protocol):
    """Micro-batches, with what a plan says of them."""

    @property
    def most_tokens(self) -> int:
        """What no micro-batch exceeds, padding included."""

    def packing_rate(self, epoch: int = 0) -> float:
        """Share of the tokens that are no padding, where rows are packed; else 1."""


class Task(ABC, Generic[B]):
    """One kind of tuning, in one run.

    A run calls `read` and `settled`, loads the base with `ending`, calls `encode`, attaches the adapter as
    `method` says, calls `batches`, `objective` and `begin`, and trains, with `held_out_loss` on the way;
    `measure` comes before and after. An evaluation calls `read_held_out`, `encode` and `measure`.
    """

    name: ClassVar[str]
    keeps_known_text: ClassVar[bool] = True
    """Whether the loss on text that the base knew is measured: forgetting, of what writes text."""
    rate_scale: ClassVar[float] = 1.0
    """What the learning rate that nobody wrote is multiplied by."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        """The recipe as far as it is settled: who changes it gives the task the new one."""
        self.why = "the recipe names it"
        """Why it is this task; `task: auto` says what it saw."""
        self.dataset: Dataset[Any]
        """What `encode` made."""

    @abstractmethod
    def read(self) -> None:
        """Read the data of the recipe and hold rows out; no model is needed for that.

        Raises:
            DataError: no usable rows, broken rows (all of them listed), or too few to hold any out.
        """

    @abstractmethod
    def read_held_out(self, limit: int | None = None) -> None:
        """Read the data of the recipe to measure all of it (the first `limit` rows), and train on none."""

    def settled(self) -> Recipe:
        """The recipe with what the task fills in from the data that `read` found, its labels for instance."""
        return self.recipe

    @property
    def ending(self) -> Ending:
        """What the base has to end in."""
        return TEXT

    @abstractmethod
    def require_base(self, model: nn.Module) -> None:
        """Refuse a base that this task cannot be learnt on.

        Raises:
            ModelError: for instance an encoder-decoder where text is continued.
        """

    @abstractmethod
    def encode(self, tokenizer: Any) -> None:
        """Make `dataset` by the recipe's lengths; what is dropped or cut is said.

        Raises:
            DataError: nothing is left to train on, or to hold out.
        """

    def method(self, model: nn.Module) -> MethodConfig:
        """The method of the recipe, with what this task trains besides: a new head, as a rule."""
        return self.recipe.method.config

    @abstractmethod
    def batches(self, tokenizer: Any) -> TaskBatches[B]:
        """The micro-batches of every epoch."""

    @abstractmethod
    def objective(self, model: nn.Module) -> Objective[B]:
        """The loss on this model, its adapter attached."""

    def begin(self, model: nn.Module, adapters: AdapterSet, run: Path, stop: StopFlag) -> None:
        """What has to be known before the first step, such as a reference's log-probabilities; kept in the
        run's folder, so that a run that goes on finds it. `stop` raises where somebody asked to stop."""

    @abstractmethod
    def held_out_loss(self, model: nn.Module) -> Evaluate:
        """The loss on held-out rows while training."""

    @abstractmethod
    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        """The model as it stands, on the held-out rows."""

    @abstractmethod
    def probes(self, count: int) -> list[list[int]]:
        """Token ids of held-out rows of different lengths, on which a reload and a merge are proved."""

    def own_parameters(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """What is trained for this run alone, by name, and is no part of the adapter: a critic, for instance.
        Asked after `objective`; `model` carries it."""
        return {}

    @property
    def openings(self) -> Sequence[TokenRow]:
        """Rows whose beginnings the base goes on from where its tokenizer has no begin token: it then says
        what it knew. Not asked of tasks that keep no known text."""
        return self.dataset.held_out

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        """What a report says of the data besides its size, such as label counts: name and value."""
        return ()


def spread(rows: Sequence[Row], count: int) -> list[Any]:
    """At most `count` rows of different lengths."""
    ordered = sorted(rows, key=lambda row: row.tokens)
    return ordered[:: max(1, len(ordered) // count)][:count]


def say_unpacked(recipe: Recipe, why: str) -> None:
    """Packing that was asked for in writing and is not done is said."""
    if recipe.data.packing and "packing" in recipe.data.model_fields_set:
        notice(f"Rows are not packed: {why}.")
