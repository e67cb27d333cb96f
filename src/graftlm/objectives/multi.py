"""Several tasks in one run: each micro-batch belongs to one of them, and only its model sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import nn

from graftlm.core.config import Config
from graftlm.data.batches import Batch
from graftlm.objectives.base import LossParts, Objective

MULTI = "multi"
"""The name of such a task in a recipe."""


class PartSettings(Config):
    """One of the tasks: a small recipe of what differs from the recipe around it."""

    task: Any
    """As in a recipe: a name, or `type` beside the settings."""
    data: dict[str, Any] = Field(default_factory=dict)
    """As in a recipe: a path, or fields; those that are not named are those of the recipe's `data`."""
    method: Any = None
    """Of this task's own adapter; by default the recipe's."""
    weight: float = Field(1.0, gt=0)
    """Factor of this task's loss."""
    learning_rate: float | None = Field(None, gt=0)
    """Of this task's own adapter; by default the recipe's, or where that says nothing, what fits the task."""
    per_device_train_batch_size: int | None = Field(None, ge=1)
    """As in the recipe's `train`, for this task alone."""

    @property
    def train(self) -> dict[str, Any]:
        """What of the recipe's `train` is this task's own."""
        own = {name: getattr(self, name) for name in ("learning_rate", "per_device_train_batch_size")}
        return {name: value for name, value in own.items() if value is not None}

    @field_validator("data", mode="before")
    @classmethod
    def _path_is_enough(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class MultiSettings(Config):
    """Several tasks on one base, each with an adapter of its own, or all with one."""

    tasks: dict[str, PartSettings]
    """Name -> task. The name is that of the adapter's folder, too."""
    adapters: Literal["one_each", "shared"] = "one_each"
    """An adapter for each task, or one for all, beside each task's own head."""
    sampling: Literal["proportional", "equal", "temperature"] = "proportional"
    """How many of an epoch's steps each task gets: in proportion to its micro-batches n, equally many, or in
    proportion to n ^ (1 / temperature)."""
    temperature: float | None = Field(None, ge=1)
    """1 is proportional; the higher, the nearer to equal."""

    @field_validator("tasks")
    @classmethod
    def _named(cls, value: dict[str, PartSettings]) -> dict[str, PartSettings]:
        if len(value) < 2:
            raise ValueError("several tasks are two at least; for one, write it as the recipe's task")
        wrong = [name for name in value if not name.replace("-", "").replace("_", "").isalnum()]
        if wrong:
            raise ValueError(f"names are made of letters, digits, - and _: {', '.join(wrong)}")
        return value

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        if (self.sampling == "temperature") != (self.temperature is not None):
            raise ValueError("temperature and sampling: temperature belong together")
        for what in ("method", "learning_rate") if self.adapters == "shared" else ():
            own = [name for name, part in self.tasks.items() if getattr(part, what) is not None]
            if own:
                raise ValueError(f"adapters: shared has one {what} for all; {', '.join(own)} names its own")
        return self

    @property
    def power(self) -> float:
        """Of a task's number of micro-batches, in its share of the steps.

        >>> MultiSettings(tasks={"a": {"task": "sft"}, "b": {"task": "sft"}}, sampling="equal").power
        0.0
        """
        if self.temperature is not None:
            return 1 / self.temperature
        return 1.0 if self.sampling == "proportional" else 0.0


@dataclass(frozen=True)
class PartBatch(Batch):
    """A micro-batch of the task `part`; `own` is it as that task made it."""

    part: str = ""
    own: Any = None


def part_batch(part: str, own: Batch) -> PartBatch:
    """The batch of a task, as one of a run of several."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return PartBatch(**{name: getattr(own, name) for name in names}, part=part, own=own)


@dataclass(frozen=True)
class Side:
    """One task of the run: what its loss is, on which model, and how much it weighs."""

    model: nn.Module
    objective: Objective[Any]
    weight: float


class MultiObjective(Objective[PartBatch]):
    """The loss of the task that a batch belongs to, times that task's weight.

    The figures of each task bear its name: `intent/accuracy`; `intent/loss` is without the weight.
    """

    def __init__(self, sides: Mapping[str, Side]) -> None:
        self.sides = dict(sides)

    def __call__(self, model: nn.Module, batch: PartBatch) -> LossParts:
        side = self.sides[batch.part]
        found = side.objective(side.model, dataclasses.replace(batch.own, inputs=batch.inputs))
        figures = {f"{batch.part}/{name}": value for name, value in found.metrics.items()}
        if found.target_tokens:
            figures[f"{batch.part}/loss"] = float(found.loss_sum.detach()) / found.target_tokens
        return LossParts(side.weight * found.loss_sum, found.target_tokens, figures)

    def probe(self, length: int) -> PartBatch:
        """Of the first task; what a step keeps is counted for each task on its own objective."""
        name, side = next(iter(self.sides.items()))
        return part_batch(name, side.objective.probe(length))
