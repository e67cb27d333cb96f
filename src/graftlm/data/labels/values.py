"""What stands in a label column, as names: text, numbers, lists of both, yes and no for each label."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from graftlm.core.errors import DataError
from graftlm.data.conversion import RowError
from graftlm.data.labels.records import JOINED

Problem = Literal["one label", "several labels", "number"]
"""What is told of a row: which one of the labels, which of them, or how much."""


def problem_of(values: Sequence[Any]) -> tuple[Problem, str]:
    """What the cells of a label column ask for, and why.

    >>> problem_of(["good", "bad"])[0], problem_of([["a", "b"], []])[0], problem_of(["1.5", "2"])[0]
    ('one label', 'several labels', 'number')
    """
    filled = [value for value in values if not _is_empty(value)]
    if 2 * sum(isinstance(value, list) for value in filled) > len(filled):
        return "several labels", "the labels are lists"
    numbers = [as_number(value) for value in filled]
    known = [number for number in numbers if number is not None]
    if known and len(known) == len(numbers) and any(number != int(number) for number in known):
        return "number", "the labels are numbers with a fraction"
    return "one label", "the labels are names or whole numbers"


def as_number(value: Any) -> float | None:
    """The finite number that a cell holds, if it does."""
    if isinstance(value, bool | list | dict) or value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def number_of(value: Any, column: str) -> float:
    """The number in a cell.

    Raises:
        RowError: there is none.
    """
    number = as_number(value)
    if number is None:
        raise RowError("no_number", f"{value!r} ({column!r}) is no finite number", "Write a number.")
    return number


def name_of(value: Any, column: str) -> str:
    """The name of one label.

    Raises:
        RowError: the cell is empty, or holds what is no label.

    >>> name_of(3, "label"), name_of(2.0, "label"), name_of(" spam ", "label"), name_of(True, "label")
    ('3', '2', 'spam', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    if isinstance(value, list | dict):
        raise RowError("bad_label", f"the label ({column!r}) is {_kind(value)}", "Write one name or number.")
    if _is_empty(value):
        raise RowError("no_label", f"the label ({column!r}) is empty", "Fill it in or remove the row.")
    return " ".join(str(value).split())


def names_of(value: Any, column: str, labels: Sequence[str], *, marks: bool) -> tuple[str, ...]:
    """The names of the labels in a list, each once; `marks`: the list has a 0 or 1 for every one of `labels`.

    Raises:
        RowError: it is no list, or holds what is no label.
    """
    if value is None:
        return ()
    cells = value if isinstance(value, list) else [value]
    if marks:
        return tuple(label for label, mark in zip(labels, cells, strict=False) if mark)
    names = tuple(dict.fromkeys(name_of(cell, column) for cell in cells))
    mixed = next((name for name in names if JOINED in name), None)
    if mixed is not None:
        raise RowError("bad_label", f"the label {mixed!r} contains {JOINED!r}", "Write a list of labels.")
    return names


def mark_width(values: Sequence[Any], labels: Sequence[str]) -> int | None:
    """How many labels lists of 0 and 1 are about; None where the lists name labels.

    >>> mark_width([[0, 1, 0], [1, 1, 0]], ()), mark_width([[0], [2, 1]], ())
    (3, None)
    """
    lists = [value for value in values if isinstance(value, list)]
    widths = {len(value) for value in lists}
    if len(widths) != 1 or any(cell not in (0, 1) for value in lists for cell in value):
        return None
    width = widths.pop()
    wanted = len(labels) if labels else max(2, width)
    return width if width == wanted else None


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Labels as they are counted: numbers by size, names by the alphabet.

    >>> in_order({"10", "9"}), in_order({"b", "a"})
    (('9', '10'), ('a', 'b'))
    """
    found = set(names)
    if all(name.lstrip("-").isdigit() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def read_label_map(path: Path) -> tuple[str, ...]:
    """Label names in their order: a JSON list, a JSON object of names and numbers, or a name on every line.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _bad_map(path, str(error)) from None
    if isinstance(content, dict):
        pairs = [(number, name) for name, number in content.items() if isinstance(number, int)]
        pairs = pairs or [(int(key), str(name)) for key, name in content.items() if key.isdigit()]
        if sorted(number for number, _ in pairs) != list(range(len(content))):
            raise _bad_map(path, "its numbers are not 0, 1, 2 and so on")
        content = [name for _, name in sorted(pairs)]
    if not isinstance(content, list) or not all(isinstance(name, str | int) for name in content):
        raise _bad_map(path, "it holds no list of names")
    names = tuple(" ".join(str(name).split()) for name in content)
    if len(set(names)) < len(names):
        raise _bad_map(path, "a name comes twice")
    return names


def _bad_map(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is no list of labels: {why}.",
        fix='Write a JSON list (["ham", "spam"]), or one name on each line of a text file.',
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "an object"
