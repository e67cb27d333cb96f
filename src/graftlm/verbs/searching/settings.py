"""What a search was asked for: kept in its folder, so that it can go on, and others can join."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from graftlm.core.config import Config, build, override
from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.core.files import write_atomic
from graftlm.search.budget import Budget
from graftlm.search.space import Space, Value
from graftlm.search.study import Sampler
from graftlm.training.recipe import Recipe
from graftlm.verbs.run_folder import SEARCH

FILE = SEARCH
SHOWN = 12
"""Problems of a space that are listed."""
Cost = Literal["parameters", "memory", "seconds"]
COSTS: tuple[Cost, ...] = ("parameters", "memory", "seconds")
Stopping = Literal["halving", "none"]
_FIXED = {
    "model.name": "losses of bases with different tokenizers cannot be compared",
    "train.seed": "the luckiest seed is not the best recipe",
    "data": "what is measured would change with it",
    "eval": "what is measured would change with it",
    "output": "it changes no result",
}
"""What a space may not vary, and why; `data.packing` alone of its section may."""


class SearchSettings(Config):
    """A search, whole."""

    recipe: dict[str, Any]
    """What the user wrote of a recipe; every trial starts from it."""
    space: dict[str, Any] = Field(default_factory=dict)
    """As in a space file."""
    budget: str = "24"
    sampler: Sampler = "tpe"
    metric: str = "auto"
    costs: tuple[Cost, ...] = ("parameters",)
    """What quality is weighed against."""
    stopping: Stopping = "halving"
    ladder: bool = False
    """Climb from the smallest method instead of sampling a space."""
    together: int | None = None
    """Trials that train at the same time over the base; none: as many as pay."""
    seed: int = 0
    """Of the sampler."""

    @property
    def limits(self) -> Budget:
        """The budget, read."""
        return Budget.parse(self.budget)

    @property
    def domain(self) -> Space:
        """The space, read."""
        return Space.parse(self.space)

    def recipe_of(self, fields: Mapping[str, Value], *more: Mapping[str, Any]) -> Recipe:
        """The recipe of a point: what the user wrote, what was settled from the data, and the point's fields.

        Raises:
            ConfigError: they do not go together.
        """
        sections = dict(self.recipe)
        for content in more:
            sections |= {
                name: {**_mapping(sections.get(name)), **section} if isinstance(section, Mapping) else section
                for name, section in content.items()
            }
        if more:  # rows are parted by now, and each trial has a folder of its own
            sections["data"] = _without(sections["data"], "eval_fraction")
            sections["output"] = _without(_mapping(sections.get("output")), "dir")
        kind = fields.get("method.type")
        if kind is not None and kind != _mapping(sections.get("method")).get("type", "lora"):
            sections["method"] = {"type": kind}  # the fields of one method are not those of another
        return build(Recipe, override(sections, as_assignments(fields)), source="A trial")


def as_assignments(fields: Mapping[str, Value]) -> list[str]:
    """As `--set` takes them."""
    return [f"{name}={json.dumps(value)}" for name, value in fields.items()]


def require_sound(settings: SearchSettings) -> None:
    """Refuse a space with fields that a recipe does not have, values they do not take, or that must not vary.

    Raises:
        ConfigError: every problem at once.
    """
    space = settings.domain
    problems = [
        f"{one.field}: {reason}"
        for one in space.parameters
        for name, reason in _FIXED.items()
        if (one.field == name or one.field.startswith(f"{name}.")) and one.field != "data.packing"
    ]
    for one in space.parameters:
        condition = dict([one.condition]) if one.condition else {}
        for value in one.domain.ends:
            problems += _problems(settings, condition | {one.field: value})
    if problems:
        unique = list(dict.fromkeys(problems))
        more = [f"... and {len(unique) - SHOWN} more"] if len(unique) > SHOWN else []
        raise ConfigError(
            "The space does not fit the recipe.",
            problems=[*unique[:SHOWN], *more],
            meaning="Each value of a space must be one that the recipe takes at this place.",
            fix="Correct these lines; fields of one method alone go under when: {method.type=NAME: ...}.",
        )


def _problems(settings: SearchSettings, fields: Mapping[str, Value]) -> Sequence[str]:
    try:
        settings.recipe_of(fields)
    except ConfigError as error:
        return error.problems or [error.seen]
    return ()


def write_settings(folder: Path, settings: SearchSettings) -> None:
    """The file whose presence says that the folder is a search that can go on."""
    content = json.dumps(settings.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomic(folder / FILE, content + "\n")


def read_settings(folder: Path) -> SearchSettings:
    """The settings of a search.

    Raises:
        CheckpointError: there is no search.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = dict(content)
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no search in {folder}.",
            meaning=f"The folder of a search holds {FILE}.",
            fix="Name its folder: graft search DIR --resume. Without --resume a new search starts.",
        ) from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no record of a search: {error}.",
            meaning="The file was edited or damaged.",
            fix="Restore it, or start a new search.",
        ) from None
    return build(SearchSettings, settings, source=str(path))


def _without(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != name}


def _mapping(section: Any) -> Mapping[str, Any]:
    return section if isinstance(section, Mapping) else {}
