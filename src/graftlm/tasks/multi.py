"""Several tasks on one base in one run: each has its data, its model over the same weights, its measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from graftlm.data.records import Format
from graftlm.evaluation.parts import joined
from graftlm.evaluation.runner import Evaluation
from graftlm.methods.base import MethodConfig
from graftlm.methods.resolve import resolve
from graftlm.models.ending import Ending
from graftlm.models.generate import Progress, StopFlag, context_length
from graftlm.models.siblings import sibling
from graftlm.objectives.multi import MULTI, MultiObjective, MultiSettings, PartBatch, Side
from graftlm.tasks.base import Task, TaskBatches
from graftlm.tasks.dataset import Dataset
from graftlm.tasks.mixture import Mixture
from graftlm.training.defaults import REFERENCE_WIDTH as WIDTH
from graftlm.training.defaults import fitted, fitted_length, room_beside
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked
from graftlm.training.parts import parts_of
from graftlm.training.recipe import Recipe
from graftlm.training.task_section import TaskChoice
from graftlm.training.train_section import TrainSection

PREFERENCE = ("text", "rows", "tokens")
"""What the base is loaded for, if any task wants it: a head that writes text is in the checkpoint, others are
new."""


class MultiTask(Task[PartBatch]):
    """Tasks that share the weights of a base and nothing else, or one adapter besides.

    `parts` are the tasks by name, `models` their models by name, made when the base is known.
    """

    name = MULTI
    keeps_known_text = False

    def __init__(self, recipe: Recipe, parts: Mapping[str, Task[Any]]) -> None:
        super().__init__(recipe)
        self.parts = dict(parts)
        self.models: dict[str, nn.Module] = {}

    @property
    def settings(self) -> MultiSettings:
        """What the recipe says of the tasks."""
        settings = self.recipe.task.settings
        assert isinstance(settings, MultiSettings)
        return settings

    def read(self) -> None:
        for part in self.parts.values():
            part.read()

    def read_held_out(self, limit: int | None = None) -> None:
        for part in self.parts.values():
            part.read_held_out(limit)

    def settled(self) -> Recipe:
        settings, tasks = self.settings, dict(self.settings.tasks)
        for name, part in self.parts.items():
            before, part.recipe = part.recipe.data, part.settled()
            data = {key: value for key, value in part.recipe.data if value != getattr(before, key)}
            told = {"task": part.recipe.task.as_dict(), "data": tasks[name].data | data}
            tasks[name] = tasks[name].replace(**told)
        choice = TaskChoice(MULTI, settings.model_copy(update={"tasks": tasks}))
        return self.recipe.model_copy(update={"task": choice})

    @property
    def ending(self) -> Ending:
        endings = [part.ending for part in self.parts.values()]
        return min(endings, key=lambda ending: PREFERENCE.index(ending.kind))

    def require_base(self, model: nn.Module) -> None:
        own = self.ending
        first = next(name for name, part in self.parts.items() if part.ending == own)
        for name, part in self.parts.items():
            self.models[name] = model if name == first else sibling(model, own, part.ending)
            part.require_base(self.models[name])

    def encode(self, tokenizer: Any) -> None:
        for name, recipe in parts_of(self.recipe).items():
            part = self.parts[name]
            part.recipe = self._fitted(name, recipe)
            part.encode(tokenizer)
        data = {name: part.dataset for name, part in self.parts.items()}
        shapes = ", ".join(f"{name} ({one.format.name}, {len(one.train):,})" for name, one in data.items())
        self.dataset = Dataset(
            self.recipe.data.path,
            Format(MULTI, {}, shapes),
            tuple(row for one in data.values() for row in one.train),
            tuple(row for one in data.values() for row in one.held_out),
            sum(one.duplicates for one in data.values()),
        )
        self._settle_steps()

    def _settle_steps(self) -> None:
        """Learning rates and batch sizes that nobody wrote: each task's are those that it has alone, but for
        the micro-batches of a step, of which all tasks have as many."""
        train, tasks = self.recipe.train, dict(self.settings.tasks)
        alone = {name: self._alone(name) for name in tasks}
        changes: dict[str, Any] = {}
        if "learning_rate" not in train.model_fields_set:
            rates = {name: own.learning_rate for name, own in alone.items()}
            changes["learning_rate"] = min(rates.values()) if self.is_shared else max(rates.values())
            if not self.is_shared:
                tasks = {name: part.replace(learning_rate=rates[name]) for name, part in tasks.items()}
        if not train.model_fields_set & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
            window = max(own.gradient_accumulation_steps for own in alone.values())
            changes["gradient_accumulation_steps"] = window
            for name, own in alone.items():
                rows = own.per_device_train_batch_size * own.gradient_accumulation_steps
                tasks[name] = tasks[name].replace(per_device_train_batch_size=-(-rows // window))
            changes["per_device_train_batch_size"] = max(
                part.per_device_train_batch_size or 1 for part in tasks.values()
            )
        choice = TaskChoice(MULTI, self.settings.model_copy(update={"tasks": tasks}))
        train = train.model_copy(update=changes)
        self.recipe = self.recipe.model_copy(update={"task": choice, "train": train})
        for name, recipe in parts_of(self.recipe).items():
            part = self.parts[name]
            part.recipe = part.recipe.model_copy(update={"train": recipe.train})

    def _alone(self, name: str) -> TrainSection:
        """The steps of a task in a run of its own."""
        part, model = self.parts[name], cast(Any, self.models[name])
        width = int(getattr(model.config.get_text_config(), "hidden_size", WIDTH))
        lengths = [row.tokens for row in part.dataset.train]
        return fitted(part.recipe, lengths, width, part.rate_scale)[0].train

    @property
    def is_shared(self) -> bool:
        """Whether all tasks train one adapter."""
        return self.settings.adapters == "shared"

    def _fitted(self, name: str, recipe: Recipe) -> Recipe:
        """The recipe of a task, its rows no longer than its model has room for."""
        room = room_beside(recipe.method.config, context_length(self.models[name]))
        if "max_length" in self.settings.tasks[name].data or room is None:
            return fitted_length(recipe, room)
        data = recipe.data.replace(max_length=min(room, recipe.data.max_length))
        return recipe.model_copy(update={"data": data})

    def method(self, model: nn.Module) -> MethodConfig:
        """That of the task whose model this is; those of all are checked."""
        configs = {name: part.method(self.models[name]) for name, part in self.parts.items()}
        for name, config in configs.items():
            resolve(self.models[name], config)
        return next(config for name, config in configs.items() if self.models[name] is model)

    def batches(self, tokenizer: Any) -> Mixture:
        return self.mixture({name: part.batches(tokenizer) for name, part in self.parts.items()})

    def mixture(self, batches: Mapping[str, TaskBatches[Any]]) -> Mixture:
        """The micro-batches of all tasks, in the order of the recipe's seed."""
        train = self.recipe.train
        window, power = train.gradient_accumulation_steps, self.settings.power
        return Mixture(batches, window=window, power=power, seed=train.seed)

    def objective(self, model: nn.Module) -> MultiObjective:
        return MultiObjective(
            {
                name: Side(self.models[name], part.objective(self.models[name]), self.weights[name])
                for name, part in self.parts.items()
            }
        )

    @property
    def weights(self) -> Mapping[str, float]:
        """The factor of each task's loss."""
        return {name: part.weight for name, part in self.settings.tasks.items()}

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        parts = {name: part.held_out_loss(self.models[name]) for name, part in self.parts.items()}
        return MultiHeldOutLoss(parts, self.weights)

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        found = {
            part: task.measure(self.models[part], tokenizer, name=name, progress=progress, stop=stop)
            for part, task in self.parts.items()
        }
        return joined(name, found)

    def probes(self, count: int) -> list[list[int]]:
        return next(iter(self.parts.values())).probes(count)

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        return [
            (f"{name}: {fact}", value)
            for name, part in self.parts.items()
            for fact, value in (("rows to train on", f"{len(part.dataset.train):,}"), *part.facts)
        ]


class MultiHeldOutLoss:
    """The mean of the tasks' held-out losses by their weights; each one is among the figures."""

    def __init__(self, parts: Mapping[str, Evaluate], weights: Mapping[str, float]) -> None:
        self.parts, self.weights = parts, weights

    def __call__(self, stop: StopAsked) -> HeldOut | None:
        found: dict[str, HeldOut] = {}
        for name, evaluate in self.parts.items():
            one = evaluate(stop)
            if one is None:
                return None
            found[name] = one
        loss = sum(self.weights[name] * one.loss for name, one in found.items()) / sum(self.weights.values())
        figures = {f"{name}/loss": one.loss for name, one in found.items()}
        figures |= {
            f"{name}/{key}": value for name, one in found.items() for key, value in one.metrics.items()
        }
        tokens, rows = (sum(getattr(one, what) for one in found.values()) for what in ("tokens", "rows"))
        return HeldOut(loss, tokens, rows, figures)
