"""Strict, typed, frozen configuration: every problem at once, with the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from graftlm.core.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration object: frozen, unknown keys are errors.

    >>> class Train(Config):
    ...     learning_rate: float = 1e-4
    >>> Train(learning_rat=1e-3)
    Traceback (most recent call last):
    graftlm.core.errors.ConfigError: Train has 1 problem.
      - learning_rat: unknown key; did you mean 'learning_rate'?
      fix: Correct the keys above.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )
    aliases: ClassVar[Mapping[str, str]] = {}
    """Names that other tools use for a field, for the suggestion when somebody writes one of them."""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise config_error(type(self), error, type(self).__name__) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})


def build(cls: type[C], mapping: Mapping[str, Any], *, source: str) -> C:
    """Validate `mapping`; a `ConfigError` lists every problem and names `source`."""
    try:
        return cls.model_validate(dict(mapping))
    except ValidationError as error:
        raise config_error(cls, error, source) from None


def config_error(cls: type[BaseModel], error: ValidationError, source: str) -> ConfigError:
    """Turn pydantic's findings into one error with a line per problem."""
    problems = [line for item in error.errors(include_url=False) for line in _describe(cls, item)]
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    return ConfigError(f"{source} has {count}.", problems=problems, fix="Correct the keys above.")


def _describe(cls: type[BaseModel], item: Any) -> list[str]:
    location = ".".join(str(part) for part in item["loc"])
    nested = item.get("ctx", {}).get("error")
    if isinstance(nested, ConfigError):
        return [f"{location}.{line}" if location else line for line in nested.problems]
    if item["type"] == "extra_forbidden":
        name = str(item["loc"][-1])
        owner = owner_of(cls, item["loc"][:-1])
        alias = owner.aliases.get(name) if issubclass(owner, Config) else None
        hint = f"; did you mean {alias!r}?" if alias else suggest(name, list(owner.model_fields))
        return [f"{location}: unknown key{hint}"]
    message = str(item["msg"]).removeprefix("Value error, ")
    where = f"{location}: " if location else ""
    seen = item.get("input")
    shown = f" (got {seen!r})" if location and not isinstance(seen, Mapping | BaseModel) else ""
    return [f"{where}{message}{shown}"]


def owner_of(cls: type[BaseModel], path: Iterable[object]) -> type[BaseModel]:
    """The model that lies at `path` below `cls`; the last one that can be found if the path is lost."""
    current: type[BaseModel] = cls
    for part in path:
        field = current.model_fields.get(str(part))
        nested = [kind for kind in _kinds(field.annotation) if _is_model(kind)] if field else []
        if not nested:
            break
        current = nested[0]
    return current


def _kinds(annotation: Any) -> list[Any]:
    return [annotation, *(inner for arg in get_args(annotation) for inner in _kinds(arg))]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def suggest(name: str, known: Sequence[str]) -> str:
    """`"; did you mean 'x'?"` or nothing.

    >>> suggest("lora_alpa", ["r", "lora_alpha"])
    "; did you mean 'lora_alpha'?"
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds no mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"No file {path}.", fix="Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}",
            fix="Correct the line named above.",
        ) from None
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} holds {type(loaded).__name__}, not key: value pairs.",
            fix="Start from 'model: ...' and 'data: ...'.",
        )
    return loaded


def dump_yaml(config: BaseModel) -> str:
    """YAML text with every effective value, in field order."""
    values = config.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) == values:
        return text
    return yaml.safe_dump(values, sort_keys=False)  # a few control characters survive only when escaped


def override(mapping: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `section.field=value` assignments; values are read as YAML.

    >>> override({"train": {"seed": 1}}, ["train.seed=2", "method.r=8"])
    {'train': {'seed': 2}, 'method': {'r': 8}}
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        parts = path.strip().split(".")
        if not separator or not all(parts):
            raise ConfigError(
                f"Cannot read the override {assignment!r}.",
                fix="Write section.field=value, for instance train.learning_rate=1e-4.",
            )
        _assign(result, parts, _scalar(text, assignment))
    return result


def _assign(mapping: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    for part in parts[:-1]:
        inner = mapping.get(part)
        mapping[part] = dict(inner) if isinstance(inner, Mapping) else {}
        mapping = mapping[part]
    mapping[parts[-1]] = value


def _scalar(text: str, assignment: str) -> Any:
    """YAML 1.1 reads `1e-4` as a string; people mean the number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"The value of {assignment!r} is not valid YAML.",
            meaning="A bracket or quote is not closed.",
            fix="Close what you open, and quote the whole assignment for the shell: 'eval.metrics=[loss]'.",
        ) from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
