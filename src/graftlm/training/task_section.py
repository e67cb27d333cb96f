"""The `task` section of a recipe: `type` names what is learnt, other keys are its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from graftlm.core.config import Config, build, suggest
from graftlm.core.errors import ConfigError
from graftlm.objectives.settings import AUTO, SETTINGS


@dataclass(frozen=True)
class TaskChoice:
    """A task as a recipe names it. In YAML: a bare name, or one mapping with `type` beside the settings.

    >>> TaskChoice.parse("sft").type
    'sft'
    """

    type: str
    settings: Config

    @classmethod
    def parse(cls, value: Any) -> TaskChoice:
        """From a mapping or a bare name.

        Raises:
            ConfigError: the name is unknown, or settings are wrong; all of them at once.
        """
        if isinstance(value, TaskChoice):
            return value
        fields = {"type": value} if isinstance(value, str) else dict(value or {})
        name = str(fields.pop("type", AUTO))
        if name not in SETTINGS:
            hint = suggest(name, list(SETTINGS)) or f"; available: {', '.join(SETTINGS)}"
            problem = f"type: no such task{hint} (got {name!r})"
            raise ConfigError("The task is not usable.", problems=[problem])
        return cls(name, build(SETTINGS[name], fields, source=f"task {name}"))

    def as_dict(self) -> dict[str, Any]:
        """The inverse of `parse`."""
        return {"type": self.type, **self.settings.model_dump(mode="json")}


TaskSection = Annotated[TaskChoice, PlainValidator(TaskChoice.parse), PlainSerializer(TaskChoice.as_dict)]
"""The type of the section in a recipe."""
