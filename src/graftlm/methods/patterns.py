"""Values by pattern of module path (`rank_pattern`, `alpha_pattern`), with PEFT's matching.

A pattern is a regular expression for a path or for an ending of it that begins after a dot. Where several
match, the first in the order of the mapping wins. A JSON file has no order, hence `order_free`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from graftlm.core.errors import TargetError

V = TypeVar("V", int, float)


def value_at(patterns: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first pattern that matches `path`.

    >>> value_at({"layers.0.q_proj": 4, "q_proj": 2}, "model.layers.0.q_proj", 8)
    4
    >>> value_at({"proj": 2}, "model.layers.0.q_proj", 8)
    8
    """
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` describes `path` or what comes after one of its dots."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def check_expressions(patterns: Mapping[str, V]) -> Mapping[str, V]:
    """`patterns` again.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None
    return patterns


def require_matches(fields: Mapping[str, Iterable[str]], paths: Sequence[str]) -> None:
    """Every pattern of every field must match one of `paths`.

    Raises:
        TargetError: patterns that match nothing, all of them.
    """
    problems = [
        f"{field}: {pattern!r} matches no target"
        for field, patterns in fields.items()
        for pattern in patterns
        if not any(matches(pattern, path) for path in paths)
    ]
    if problems:
        count = f"{len(problems)} pattern" + ("s match" if len(problems) > 1 else " matches")
        raise TargetError(
            f"{count} none of the {len(paths)} target modules.",
            problems=problems,
            meaning="The name is spelled differently here, or target_modules leaves that module out.",
            fix=f"Name endings of target paths, such as {paths[0]!r}." if paths else "Choose other targets.",
        )


def order_free(patterns: Mapping[str, V], paths: Sequence[str]) -> dict[str, V]:
    """Patterns that give every one of `paths` the same value in any order: as given, or by whole path.

    >>> order_free({"1.q": 4, "q": 2}, ["0.q", "1.q"])
    {'^0\\\\.q': 2, '^1\\\\.q': 4}
    """
    found = {path: [v for pattern, v in patterns.items() if matches(pattern, path)] for path in paths}
    if all(len(set(values)) <= 1 for values in found.values()):
        return dict(patterns)
    return {f"^{re.escape(path)}": values[0] for path, values in found.items() if values}
