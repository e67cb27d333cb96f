"""Which task a recipe names: the one table from name to class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftlm.objectives.settings import AUTO
from graftlm.tasks.base import Task
from graftlm.tasks.sft import SftTask
from graftlm.training.recipe import Recipe
from graftlm.training.task_section import TaskChoice

TASKS: Mapping[str, type[Task[Any]]] = {
    "sft": SftTask,
}


def task_of(recipe: Recipe) -> Task[Any]:
    """The task of a recipe; `auto` is told from the data, and said why.

    Raises:
        DataError: the data cannot be read, or have no known shape.
    """
    if recipe.task.type == AUTO:
        recipe = recipe.model_copy(update={"task": TaskChoice.parse("sft")})
    return TASKS[recipe.task.type](recipe)
