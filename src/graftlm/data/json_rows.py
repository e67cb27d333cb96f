"""JSON Lines and JSON arrays to rows, in plain Python; every broken row is collected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from graftlm.data.records import Problem

Rows = list[dict[str, Any]]
Parsed = tuple[Rows, list[int], list[Problem]]

#: Keys under which people wrap the list of rows in one JSON object.
_WRAPPERS = ("data", "rows", "train", "examples", "instances", "items")

_ROW_FIX = 'Write one object per row, for instance {"prompt": "...", "completion": "..."}.'


def parse_lines(lines: Sequence[str | None]) -> Parsed:
    """JSON Lines: one object per line; empty lines are skipped; None (undecodable) is passed over.

    >>> rows, numbers, problems = parse_lines(['{"a": 1}', "", "{'a': 2}"])
    >>> rows, numbers
    ([{'a': 1}], [1])
    >>> print(problems[0].row, problems[0].fix)
    3 Strings need double quotes; this line looks like Python, not JSON.
    """
    rows: Rows = []
    numbers: list[int] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        if line is None or not line.strip():
            continue
        value, problem = _loads(line, number)
        problem = problem or _not_a_row(value, number)
        if problem is None:
            rows.append(value)
            numbers.append(number)
        else:
            problems.append(problem)
    return rows, numbers, problems


def parse_document(text: str) -> Parsed:
    """One JSON array of objects, or an object that wraps one such as `{"data": [...]}`.

    Numbers count the items of the array from 1. A syntax error anywhere makes the whole file
    unreadable: then there are no rows and one problem, whose row is the line of the error.
    """
    value, problem = _loads(text, 1)
    if problem is not None:
        return [], [], [problem]
    rows: Rows = []
    numbers: list[int] = []
    problems: list[Problem] = []
    for number, item in enumerate(_items(value), start=1):
        fault = _not_a_row(item, number)
        if fault is None:
            rows.append(item)
            numbers.append(number)
        else:
            problems.append(fault)
    return rows, numbers, problems


def _items(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists: list[list[Any]] = [value[key] for key in _WRAPPERS if isinstance(value.get(key), list)]
        # A row of its own may hold a list too; a wrapper has next to nothing beside it.
        if len(lists) == 1 and len(value) <= 3 and all(isinstance(item, dict) for item in lists[0]):
            return lists[0]
    return [value]


def _loads(text: str, number: int) -> tuple[Any, Problem | None]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"broken JSON: {error.msg} in column {error.colno}"
        return None, Problem(number + error.lineno - 1, "error", "broken_json", what, _hint(text, error))
    except (ValueError, RecursionError) as error:
        # Integers of thousands of digits, and nesting deeper than the parser's stack.
        what = f"JSON that cannot be read: {str(error)[:100]}"
        return None, Problem(number, "error", "broken_json", what, "Correct or remove the row.")
    return value, _surrogates(value, text, number)


def _hint(text: str, error: json.JSONDecodeError) -> str:
    stripped = text.strip()
    if stripped.startswith(("{'", "['")):
        return "Strings need double quotes; this line looks like Python, not JSON."
    if error.pos >= len(stripped) - 1 or error.msg.startswith("Unterminated"):
        return "The row is cut off; it has to end in '}' on the same line (a line break inside text is \\n)."
    if error.msg == "Extra data":
        return "Put every object on its own line."
    return "Correct the row; a JSON checker shows the place."


def _not_a_row(value: Any, number: int) -> Problem | None:
    if isinstance(value, dict):
        if value:
            return None
        return Problem(number, "error", "empty_row", "the row is an empty object", _ROW_FIX)
    kinds = {str: "a text", list: "a list", bool: "true/false", type(None): "null"}
    kind = kinds.get(type(value), "a number")
    return Problem(number, "error", "not_an_object", f"the row is {kind}, not an object", _ROW_FIX)


def _surrogates(value: Any, text: str, number: int) -> Problem | None:
    """JSON may spell half of an emoji (a lone surrogate); no tokenizer takes that."""
    if "\\ud" not in text and "\\uD" not in text:
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        fix = "Write the whole character (both \\u halves, or the character itself)."
        return Problem(number, "error", "half_character", "a \\u escape is half of a character", fix)
    except RecursionError:
        return Problem(number, "error", "broken_json", "the row is nested too deeply", "Flatten the row.")
    return None
