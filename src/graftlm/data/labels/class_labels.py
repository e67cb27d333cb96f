"""Columns whose numbers stand for names, as the data sets library stores them: the names are what is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Names = Mapping[str, tuple[str, ...]]
"""Column -> the name of each of its numbers."""


def names_in(features: Any) -> Names:
    """The columns with such names, by the features of a data set as JSON has them.

    >>> names_in({"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "text": {"_type": "Value"}})
    {'label': ('neg', 'pos')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for column, kind in features.items() if isinstance(features, Mapping) else ():
        inner = kind.get("feature", kind) if isinstance(kind, Mapping) else {}
        if isinstance(inner, Mapping) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[column] = tuple(map(str, inner["names"]))
    return found


def names_in_schema(metadata: Mapping[bytes, bytes] | None) -> Names:
    """The same of a Parquet file that the data sets library wrote, by the metadata of its schema."""
    try:
        content = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return {}
    return names_in(content.get("info", {}).get("features", {}))


def with_names(rows: Sequence[Mapping[str, Any]], names: Names) -> list[dict[str, Any]]:
    """The rows with names in place of numbers; a number that stands for none (-1: no label) becomes None.

    >>> with_names([{"label": 1}, {"label": -1}], {"label": ("neg", "pos")})
    [{'label': 'pos'}, {'label': None}]
    """
    return [
        {column: _named(value, names[column]) if column in names else value for column, value in row.items()}
        for row in rows
    ]


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return names[value] if 0 <= value < len(names) else None
    return value
