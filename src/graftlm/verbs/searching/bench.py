"""What all trials of a search share: the loaded base, and data that were read and encoded once."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.core.progress import progress
from graftlm.evaluation.runner import Evaluation
from graftlm.models.generate import StopFlag, context_length
from graftlm.tasks.base import Task
from graftlm.tasks.seq2seq import Seq2SeqTask
from graftlm.tasks.sft import SftTask
from graftlm.tasks.table import task_of
from graftlm.training.defaults import fitted, fitted_length, room_beside
from graftlm.training.recipe import Recipe
from graftlm.verbs.base import load_base
from graftlm.verbs.plan import width_of
from graftlm.verbs.searching.metric import AUTO, LOSS


class Bench:
    """One base in memory, and the tasks that were read on it. A trial that wants another base (or the same
    one stored otherwise) makes it load that instead: one base is in memory at a time."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._tokenizer: Any = None
        self._loaded = ""
        self._tasks: dict[str, Task[Any]] = {}

    def model(self, recipe: Recipe) -> nn.Module:
        """The base of a recipe."""
        wanted = json.dumps(recipe.model.model_dump(mode="json"), sort_keys=True)
        if self._model is None or wanted != self._loaded:
            self._tasks.clear()
            self._model = None
            self._model, self._tokenizer = load_base(recipe.model, ending=self._read(recipe).ending)
            self._loaded = wanted
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Of the base that is loaded."""
        return self._tokenizer

    def task(self, recipe: Recipe) -> Task[Any]:
        """The task of a recipe with its rows encoded, and in it the recipe fitted to base and data: what
        `graft tune` makes of the same recipe."""
        model = self.model(recipe)
        room = room_beside(recipe.method.config, context_length(model))
        recipe = fitted_length(recipe, room)
        key = _key(recipe)
        if key not in self._tasks:
            task = self._read(recipe)
            task.require_base(model)
            task.recipe = recipe
            task.encode(self._tokenizer)
            self._tasks[key] = task
        task = self._own(self._tasks[key], recipe)
        lengths = [row.tokens for row in task.dataset.train]
        task.recipe = fitted(recipe, lengths, width_of(model), task.rate_scale)[0]
        return task

    def held_out(self, recipe: Recipe, path: Path) -> Task[Any]:
        """The same task with all rows of another file to be measured."""
        model = self.model(recipe)
        recipe = fitted_length(recipe, room_beside(recipe.method.config, context_length(model)))
        data = recipe.data.replace(path=str(path), eval_path=None)
        recipe = recipe.model_copy(update={"data": data})
        key = f"measure {_key(recipe)}"
        if key not in self._tasks:
            task = task_of(recipe)
            task.read_held_out()
            task.require_base(model)
            task.encode(self._tokenizer)
            self._tasks[key] = task
        return self._own(self._tasks[key], recipe)

    def measure(self, task: Task[Any], metric: str, name: str, stop: StopFlag) -> Evaluation:
        """The base as it stands, on the held-out rows. Answers are written only where they are judged."""
        recipe = task.recipe
        by_loss = isinstance(task, SftTask | Seq2SeqTask) if metric == LOSS else isinstance(task, SftTask)
        if metric in (LOSS, AUTO) and by_loss and recipe.eval.metrics == "auto":
            section = recipe.eval.model_copy(update={"metrics": (LOSS,)})
            task = self._own(task, recipe.model_copy(update={"eval": section}))
        assert self._model is not None
        with progress(f"measuring {name}") as tick:
            return task.measure(self._model, self._tokenizer, name=name, progress=tick, stop=stop)

    def _read(self, recipe: Recipe) -> Task[Any]:
        task = task_of(recipe)
        task.read()
        return task

    def _own(self, task: Task[Any], recipe: Recipe) -> Task[Any]:
        """A task of the same rows with a recipe of its own."""
        found = copy.copy(task)
        found.recipe = recipe
        return found


def _key(recipe: Recipe) -> str:
    """What decides the encoded rows."""
    parts: Mapping[str, Any] = {"data": recipe.data.model_dump(mode="json"), "task": recipe.task.as_dict()}
    return json.dumps(parts, sort_keys=True)
