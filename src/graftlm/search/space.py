"""What a search may choose: fields of a recipe, each with its values or its range, some under a condition."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError

Value = Any
"""Whatever YAML can write: a number, a name, a list of names."""
WHEN = "when"
_KEYS = ("values", "low", "high", "log", "step")
_EXAMPLE = "train.learning_rate: {low: 1e-4, high: 2e-3, log: true}, or method.r: [4, 8, 16]"


@dataclass(frozen=True)
class Values:
    """One of several values. Numbers in rising order have neighbours, names have none."""

    values: tuple[Value, ...]

    @property
    def is_ordered(self) -> bool:
        """Whether neighbours are alike."""
        numbers = [value for value in self.values if _is_number(value)]
        return len(numbers) == len(self.values) > 2 and list(self.values) == sorted(numbers)

    @property
    def size(self) -> int:
        """How many different values there are."""
        return len(self.values)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that must be right if all are."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A number between two ends, both included; whole where both ends (and the step) are whole."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))

    @property
    def size(self) -> float:
        """How many different values there are; infinite without a step."""
        if self.step is None and not self.is_whole:
            return math.inf
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    @property
    def ends(self) -> tuple[Value, ...]:
        """The two ends."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Parameter:
    """One thing that varies: a field of the recipe, under a condition (field, value) or always."""

    field: str
    domain: Values | Range
    condition: tuple[str, Value] | None = None

    @property
    def name(self) -> str:
        """Unique in the space: the same field may have another range under another condition."""
        return self.field if self.condition is None else f"{condition_text(self.condition)}: {self.field}"


Point = Mapping[str, Value]
"""Parameter name -> value; parameters whose condition does not hold are missing."""


@dataclass(frozen=True)
class Space:
    """Every parameter, those without a condition first.

    >>> rates = {"low": 1e-4, "high": 1e-3, "log": True}
    >>> space = Space.parse({"method.r": [4, 8], "train.learning_rate": rates})
    >>> [parameter.name for parameter in space.parameters], space.size
    (['method.r', 'train.learning_rate'], inf)
    """

    parameters: tuple[Parameter, ...]

    @classmethod
    def parse(cls, content: Mapping[str, Any], source: str = "The space") -> Space:
        """From what a file holds: `section.field: [values]`, `{low, high}`, and `when: {field=value: ...}`.

        Raises:
            ConfigError: every problem at once.
        """
        problems: list[str] = []
        plain = {key: value for key, value in content.items() if key != WHEN}
        found = list(_parameters(plain, None, problems))
        conditions = content.get(WHEN) or {}
        if not isinstance(conditions, Mapping):
            problems.append(f"{WHEN}: holds conditions, such as method.type=lora: ...")
            conditions = {}
        for text, inner in conditions.items():
            condition = _condition(str(text), found, problems)
            if condition is not None and isinstance(inner, Mapping):
                found += _parameters(inner, condition, problems)
            elif condition is not None:
                problems.append(f"{WHEN} {text}: holds fields, not {inner!r}")
        problems += _clashes(found)
        if problems:
            count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
            raise ConfigError(f"{source} has {count}.", problems=problems, fix=f"Write {_EXAMPLE}.")
        if not found or all(parameter.domain.size == 1 for parameter in found):
            raise ConfigError(
                f"{source} is empty: it leaves nothing to choose.",
                meaning="A search needs at least one field with two values.",
                fix=f"Write {_EXAMPLE}.",
            )
        return cls(tuple(found))

    @property
    def size(self) -> float:
        """How many different points there are."""
        driving = {one.condition[0] for one in self.parameters if one.condition is not None}
        free = [one for one in self.parameters if one.condition is None]
        drivers = [one for one in free if one.field in driving]
        found = 0.0
        for values in product(*(_listed(one.domain) for one in drivers)):
            point = {one.name: value for one, value in zip(drivers, values, strict=True)}
            met = [one for one in self.active(point) if one.condition is not None]
            found += math.prod(one.domain.size for one in met)
        return found * math.prod(one.domain.size for one in free if one.field not in driving)

    def active(self, point: Point) -> list[Parameter]:
        """The parameters that a point has: those without a condition, and those whose condition it meets."""
        free = [one for one in self.parameters if one.condition is None]
        chosen = {one.field: point[one.name] for one in free if one.name in point}
        return [
            one
            for one in self.parameters
            if one.condition is None or chosen.get(one.condition[0]) == one.condition[1]
        ]

    def fields(self, point: Point) -> dict[str, Value]:
        """Recipe field -> value."""
        return {one.field: point[one.name] for one in self.active(point)}

    def points(self) -> Iterator[dict[str, Value]]:
        """Every point of a space that has finitely many."""
        free = [one for one in self.parameters if one.condition is None]
        for values in product(*(_listed(one.domain) for one in free)):
            point = {one.name: value for one, value in zip(free, values, strict=True)}
            rest = [one for one in self.active(point) if one.condition is not None]
            for more in product(*(_listed(one.domain) for one in rest)):
                yield point | {one.name: value for one, value in zip(rest, more, strict=True)}


def condition_text(condition: tuple[str, Value]) -> str:
    """As it is written in a file.

    >>> condition_text(("method.type", "lora"))
    'method.type=lora'
    """
    return f"{condition[0]}={condition[1] if isinstance(condition[1], str) else json.dumps(condition[1])}"


def _parameters(
    content: Mapping[str, Any], condition: tuple[str, Value] | None, problems: list[str], prefix: str = ""
) -> Iterator[Parameter]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and not set(value) & set(_KEYS) and "." not in name:
            yield from _parameters(value, condition, problems, f"{name}.")  # a section: train: {...}
            continue
        if "." not in name:
            problems.append(f"{name}: a field is written section.field, such as method.r")
            continue
        domain = _domain(name, value, problems)
        if domain is not None:
            yield Parameter(name, domain, condition)


def _domain(name: str, value: Any, problems: list[str]) -> Values | Range | None:
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in _KEYS]:
            problems.append(f"{name}: unknown key {unknown[0]!r}{suggest(str(unknown[0]), _KEYS)}")
            return None
        if "values" not in value:
            return _range(name, value, problems)
        if len(value) > 1:
            problems.append(f"{name}: either values, or low and high")
            return None
        value = value["values"]
    values = [_number(one) for one in (value if isinstance(value, list | tuple) else [value])]
    if not values:
        problems.append(f"{name}: no values")
        return None
    unique = list({json.dumps(one, sort_keys=True): one for one in values}.values())
    return Values(tuple(unique))


def _range(name: str, value: Mapping[str, Any], problems: list[str]) -> Range | None:
    low, high, step = (_number(value.get(key)) for key in ("low", "high", "step"))
    log = value.get("log", False)
    if not _is_number(low) or not _is_number(high) or not (step is None or _is_number(step)):
        problems.append(f"{name}: a range needs two numbers, low and high")
    elif not math.isfinite(low) or not math.isfinite(high) or low >= high:
        problems.append(f"{name}: empty: low is {low:g} and high is {high:g}")
    elif not isinstance(log, bool):
        problems.append(f"{name}: log is true or false (got {log!r})")
    elif log and low <= 0:
        problems.append(f"{name}: on a log scale low must be above 0 (got {low:g})")
    elif step is not None and (log or step <= 0 or step > high - low):
        problems.append(f"{name}: step must be above 0, within the range, and not on a log scale")
    else:
        return Range(low, high, log, step)
    return None


def _condition(text: str, found: Sequence[Parameter], problems: list[str]) -> tuple[str, Value] | None:
    """`field=value`, where the field is one that the space chooses among values."""
    name, separator, written = text.partition("=")
    name, wanted = name.strip(), _number(written.strip())
    known = {one.field: one.domain for one in found if one.condition is None}
    domain = known.get(name)
    if not separator or domain is None:
        hint = suggest(name, list(known))
        problems.append(f"{WHEN} {text}: write field=value of a field that the space chooses{hint}")
    elif not isinstance(domain, Values) or wanted not in domain.values:
        problems.append(f"{WHEN} {text}: {name} never takes the value {wanted!r}")
    else:
        return name, wanted
    return None


def _clashes(found: Sequence[Parameter]) -> list[str]:
    free = {one.field for one in found if one.condition is None}
    return [
        f"{one.name}: {one.field} is also chosen without a condition"
        for one in found
        if one.condition is not None and one.field in free
    ]


def _listed(domain: Values | Range) -> list[Value]:
    if isinstance(domain, Values):
        return list(domain.values)
    step = domain.step or 1
    return [domain.low + index * step for index in range(int(domain.size))]


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string; people mean the number."""
    if isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            return value
        return int(found) if found.is_integer() and "e" not in value.lower() and "." not in value else found
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
