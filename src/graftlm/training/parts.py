"""A recipe of several tasks: each of them is a recipe of its own, by what it says and what all share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from graftlm.core.config import Config, build
from graftlm.core.errors import ConfigError
from graftlm.objectives.multi import MULTI, MultiSettings

R = TypeVar("R", bound=Config)

WRITES = "writes its own rows as it learns; tune it in a run of its own"
ALONE = {MULTI: "cannot be one of several tasks", "grpo": WRITES, "rloo": WRITES, "ppo": WRITES}
"""Tasks that cannot be one of several, and why."""


def parts_of(recipe: R) -> dict[str, R]:
    """The recipe of each task of a recipe, where there are several; none otherwise.

    Raises:
        ConfigError: every problem of every task.
    """
    outer: Any = recipe
    settings = outer.task.settings
    if not isinstance(settings, MultiSettings):
        return {}
    shared = {name: value for name, value in recipe if name not in ("task", "data", "method", "train")}
    fields = {name: getattr(outer.data, name) for name in outer.data.model_fields_set}
    found, problems = dict[str, R](), list[str]()
    for name, part in settings.tasks.items():
        own = {
            "task": part.task,
            "data": fields | part.data,
            "method": part.method or outer.method,
            "train": outer.train.model_copy(update=part.train),
        }
        try:
            inner: Any = build(type(recipe), {**shared, **own}, source=name)
        except ConfigError as error:
            problems += [f"task.tasks.{name}.{line}" for line in error.problems]
            continue
        if inner.task.type in ALONE:
            problems.append(f"task.tasks.{name}.task: {inner.task.type} {ALONE[inner.task.type]}")
        found[name] = inner
    if problems:
        raise ConfigError("The tasks of the recipe are not usable.", problems=problems)
    return found


def with_paths(sections: dict[str, Any]) -> dict[str, Any]:
    """Where each of several tasks has data of its own, the path of `data` only names them all.

    >>> tasks = {"one": {"task": "sft", "data": "a.csv"}, "two": {"task": "sft", "data": {"path": "b.csv"}}}
    >>> with_paths({"task": {"type": "multi", "tasks": tasks}})["data"]
    {'path': 'a.csv + b.csv'}
    """
    task, data = sections.get("task"), sections.get("data") or {}
    tasks = task.get("tasks") if isinstance(task, Mapping) and task.get("type") == MULTI else None
    if not isinstance(tasks, Mapping) or not isinstance(data, Mapping) or "path" in data:
        return sections
    own = [part.get("data") for part in tasks.values() if isinstance(part, Mapping)]
    paths = [each.get("path") if isinstance(each, Mapping) else each for each in own]
    return {**sections, "data": {"path": " + ".join(dict.fromkeys(map(str, filter(None, paths)))), **data}}
