"""Which task a recipe names: the one table from name to class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftlm.models.base_kind import BaseKind
from graftlm.objectives.multi import MULTI
from graftlm.objectives.settings import AUTO
from graftlm.tasks.auto import told
from graftlm.tasks.base import Task
from graftlm.tasks.classification import ClassificationTask
from graftlm.tasks.kto import KtoTask
from graftlm.tasks.multi import MultiTask
from graftlm.tasks.policy.groups import GrpoTask, RlooTask
from graftlm.tasks.policy.ppo import PpoTask
from graftlm.tasks.preference import DpoTask, IpoTask, OrpoTask, SimpoTask
from graftlm.tasks.reward import RewardTask
from graftlm.tasks.seq2seq import Seq2SeqTask
from graftlm.tasks.sft import SftTask
from graftlm.tasks.token_classification import TokenClassificationTask
from graftlm.training.parts import parts_of
from graftlm.training.recipe import Recipe
from graftlm.training.task_section import TaskChoice

TASKS: Mapping[str, type[Task[Any]]] = {
    "sft": SftTask,
    "seq2seq": Seq2SeqTask,
    "reward": RewardTask,
    "classification": ClassificationTask,
    "token_classification": TokenClassificationTask,
    "dpo": DpoTask,
    "ipo": IpoTask,
    "simpo": SimpoTask,
    "orpo": OrpoTask,
    "kto": KtoTask,
    "grpo": GrpoTask,
    "rloo": RlooTask,
    "ppo": PpoTask,
}


def task_of(recipe: Recipe, kind: BaseKind | None = None) -> Task[Any]:
    """The task of a recipe; `auto` is told from the data and the base, and `why` says what was seen.
    `kind`: of the base, where it is known already.

    Raises:
        DataError: the data cannot be read, or have no known shape; ModelError: there is no such base.
    """
    if recipe.task.type == MULTI:
        return MultiTask(recipe, {name: task_of(part, kind) for name, part in parts_of(recipe).items()})
    if recipe.task.type != AUTO:
        return TASKS[recipe.task.type](recipe)
    found = told(recipe.data.path, recipe.data.format, recipe.model.name, kind)
    task = TASKS[found.task](recipe.model_copy(update={"task": TaskChoice.parse(found.task)}))
    task.why = found.why
    return task
