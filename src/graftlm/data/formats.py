"""Which of the known shapes a file's rows have, told from their keys, and why.

| name | columns | becomes |
|---|---|---|
| `messages` | messages: role, content (and tool_calls) | conversation |
| `sharegpt` | conversations: from, value | conversation |
| `alpaca` | instruction, input, output; or instruction and nested instances | one exchange |
| `prompt_completion` | prompt, completion | prompt and completion |
| `question_answer` | question, answer | prompt and completion |
| `text_label` | text, label | prompt and completion |
| `source_target` | source, target | prompt and completion |
| `preference` | chosen, rejected; or an answer with a good/bad mark | preference pairs, marked answers |
| `text` | text | plain text |
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, DataError
from graftlm.data.columns import ALIASES, FIELDS, FINDERS, ColumnNames, has
from graftlm.data.conversion import CONVERTERS, RowError
from graftlm.data.records import Example, Format, Problem

NAMES = tuple(FIELDS)
_CALL = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<columns>[^()]*)\))?\s*")


def detect(rows: Sequence[Mapping[str, Any]], format: str = "auto") -> Format:
    """Tell the format of `rows`, or take the one the user named.

    `format`: "auto", a name of `NAMES`, or a name with its columns such as
    `source_target(word, gb)`.

    Raises:
        DataError: no usable column; the columns seen and the nearest known names are given.
        ConfigError: `format` names no known format.

    >>> found = detect([{"Question": "2+2?", "Answer": "4"}])
    >>> found.name, found.columns
    ('question_answer', {'question': 'Question', 'answer': 'Answer'})
    >>> detect([{"a": "x", "b": "y"}], "source_target(a, b)").columns
    {'source': 'a', 'target': 'b'}
    """
    columns = ColumnNames(rows)
    if format.strip() == "auto":
        for finder in FINDERS:
            found = finder(columns)
            if found is not None:
                return found
        raise _no_usable_column(columns)
    return _named(columns, format)


def to_examples(
    rows: Sequence[Mapping[str, Any]], format: Format, numbers: Sequence[int] | None = None, source: str = ""
) -> tuple[list[Example], list[Problem]]:
    """Convert every row; `numbers` are the rows' 1-based numbers in `source` (default: 1, 2, ...).

    Rows that cannot be used are left out and listed, each with its number.

    Raises:
        DataError: preference data whose format the user did not name on purpose.

    >>> rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+3=", "completion": ""}]
    >>> examples, problems = to_examples(rows, detect(rows))
    >>> examples[0].turns[1]
    Turn(role='assistant', text='4', trained=True)
    >>> print(problems[0])
    row 2: the answer ('completion') is empty. Fill it in or remove the row.
    """
    if format.name == "preference" and format.origin == "detected":
        task = "kto" if "mark" in format.columns else "dpo"
        raise DataError(
            f"This is preference data: {format.why}.",
            meaning=f"Who learns from preferences needs --task {task}.",
            fix="To imitate the better answers instead, name the format: --set data.format=preference",
        )
    convert = CONVERTERS[format.name]
    examples: list[Example] = []
    problems = list(format.problems)
    for index, row in enumerate(rows):
        number = numbers[index] if numbers is not None else index + 1
        try:
            drafts = convert(row, format.columns)
        except RowError as error:
            problems.append(Problem(number, "error", error.code, str(error), error.fix))
            continue
        for draft in drafts:
            problems += [Problem(number, "warning", *note) for note in draft.notes]
            examples.append(
                Example(
                    draft.turns, number, source, draft.style, tools=draft.tools, continues=draft.continues
                )
            )
    return examples, problems


def _named(columns: ColumnNames, format: str) -> Format:
    call = _CALL.fullmatch(format)
    name = call["name"] if call else format
    if call is None or name not in FIELDS:
        raise ConfigError(
            f"Unknown data format {format!r}{suggest(name, NAMES)}",
            fix=f"Use auto, one of {', '.join(NAMES)}, or name the columns: source_target(first, second).",
        )
    fields = FIELDS[name]
    if call["columns"] is not None:
        given = [column.strip() for column in call["columns"].split(",") if column.strip()]
        missing = [column for column in given if column not in columns.all]
        if len(given) != len(fields) or missing:
            raise ConfigError(
                f"{format!r} does not fit: "
                + (f"no column {missing[0]!r}" if missing else f"{name} takes {len(fields)} columns"),
                meaning=f"{name} needs ({', '.join(fields)}); the rows have {', '.join(columns.all)}.",
                fix=f"Write {name}({', '.join(f'<{field}>' for field in fields)}) with those names.",
            )
        return Format(
            name, dict(zip(fields, given, strict=True)), "the format and columns were given", "user"
        )
    for finder in FINDERS:
        found = finder(columns)
        if found is not None and found.name == name:
            return Format(name, found.columns, f"the format was given; {found.why}", "user", found.problems)
    if name in ALIASES:
        aliases = ALIASES[name]
        mapped = {field: column for field in fields if (column := columns.find(*aliases[field]))}
        if len(mapped) == len(fields):
            return Format(name, mapped, f"the format was given; {has(mapped)}", "user")
    raise DataError(
        f"The rows do not have the columns of {name!r}: they have {', '.join(columns.all) or 'none'}.",
        meaning=f"{name} needs {' and '.join(fields)}.",
        fix=f"Rename the columns, name them as in {name}({', '.join(fields)}), or use format: auto.",
    )


def _no_usable_column(columns: ColumnNames) -> DataError:
    known = sorted({field for names in FIELDS.values() for field in names})
    near = []
    for column in columns.all:
        match = difflib.get_close_matches(column.strip().lower(), known, n=1, cutoff=0.7)
        near += [f"{column!r} is near the known name {match[0]!r}"] if match else []
    texts = columns.texts()[:2]
    example = f"source_target({', '.join(texts)})" if len(texts) == 2 else "source_target(first, second)"
    return DataError(
        f"No usable column: the rows have {', '.join(map(repr, columns.all)) or 'no columns'}.",
        meaning=f"Known names are {', '.join(known)} (and their usual variants).",
        fix=f"Rename the columns, or say which are which: format: {example}",
        problems=near,
    )
