"""Which columns hold the texts and the labels of rows, told from their names or as the user says.

| name | columns | becomes |
|---|---|---|
| `text_label` | text, label | a text and its label, labels or number |
| `text_pair_label` | text, text_pair, label | two texts and what they have to do with each other |
| `words_tags` | words, tags | words with a tag each |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, DataError
from graftlm.data.columns import ALIASES, ColumnNames, has
from graftlm.data.records import Format

LABELS = (
    *("label_text", "label", "labels", "category", "categories", "intent", "class", "sentiment"),
    *("emotion", "topic", "topics", "genre", "score", "stars", "rating", "target"),
)
PAIRS = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2")),
    *(("question1", "question2"), ("text_a", "text_b"), ("sentence_a", "sentence_b")),
    *(("question", "sentence"), ("query", "passage"), ("query", "document"), ("question", "context")),
)
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "ner", "pos_tags", "upos", "pos", "chunk_tags", "labels", "label")

LABELLED: dict[str, tuple[str, ...]] = {
    "text_label": ("text", "label"),
    "text_pair_label": ("text", "text_pair", "label"),
}
TAGGED: dict[str, tuple[str, ...]] = {"words_tags": ("words", "tags")}
"""Format -> its fields, in the order in which a user names their columns."""

_CALL = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<columns>[^()]*)\))?\s*")


def labelled_columns(rows: Sequence[Mapping[str, Any]], format: str) -> Format:
    """Where texts and labels are.

    Raises:
        DataError: no column of that kind; ConfigError: `format` names none.

    >>> labelled_columns([{"premise": "It rains.", "hypothesis": "It is wet.", "label": 1}], "auto").name
    'text_pair_label'
    """
    columns = ColumnNames(rows)
    return _given(columns, format, LABELLED) or _labelled(columns, format) or _refused(columns, LABELLED)


def tagged_columns(rows: Sequence[Mapping[str, Any]], format: str) -> Format:
    """Where words and tags are; errors as of `labelled_columns`."""
    columns = ColumnNames(rows)
    return _given(columns, format, TAGGED) or _tagged(columns) or _refused(columns, TAGGED)


def _labelled(columns: ColumnNames, format: str) -> Format | None:
    label = columns.find(*LABELS)
    if label is None:
        return None
    pairs = ((columns.find(one), columns.find(other)) for one, other in PAIRS)
    first, second = next(((a, b) for a, b in pairs if a and b), (None, None))
    if first and second and format.strip() != "text_label":
        found = {"text": first, "text_pair": second, "label": label}
        return Format("text_pair_label", found, has(found))
    text = columns.find(*ALIASES["text_label"]["text"])
    others = [name for name in columns.texts() if name != label]
    text = text if text != label and text is not None else others[0] if len(others) == 1 else None
    if text is None or format.strip() == "text_pair_label":
        return None
    found = {"text": text, "label": label}
    return Format("text_label", found, has(found))


def _tagged(columns: ColumnNames) -> Format | None:
    words = next((name for name in map(columns.find, WORDS) if name and _is_list(columns, name)), None)
    tags = next((name for name in map(columns.find, TAGS) if name and _is_list(columns, name)), None)
    if words is None or tags is None:
        return None
    found = {"words": words, "tags": tags}
    return Format("words_tags", found, has(found))


def _is_list(columns: ColumnNames, name: str) -> bool:
    return isinstance(columns.sample(name), list)


def _given(columns: ColumnNames, format: str, fields: Mapping[str, tuple[str, ...]]) -> Format | None:
    """What the user said; None where that leaves the columns open."""
    call = _CALL.fullmatch(format)
    name = call["name"] if call else format
    if name == "auto":
        return None
    if call is None or name not in fields:
        raise ConfigError(
            f"Data format {format!r} holds no labels{suggest(name, list(fields)) or '.'}",
            fix=f"Use auto, {' or '.join(fields)}, or name the columns: {_example(fields)}.",
        )
    if call["columns"] is None:
        return None
    given = [column.strip() for column in call["columns"].split(",") if column.strip()]
    missing = [column for column in given if column not in columns.all]
    if missing or len(given) != len(fields[name]):
        wrong = f"no column {missing[0]!r}" if missing else f"{name} takes {len(fields[name])} columns"
        raise ConfigError(
            f"{format!r} does not fit: {wrong}",
            meaning=f"{name} needs ({', '.join(fields[name])}); the rows have {', '.join(columns.all)}.",
            fix=f"Write {name}({', '.join(f'<{field}>' for field in fields[name])}) with those names.",
        )
    return Format(name, dict(zip(fields[name], given, strict=True)), "the columns were given", "user")


def _refused(columns: ColumnNames, fields: Mapping[str, tuple[str, ...]]) -> Format:
    known = ("'words' and 'tags'", "(lists)") if fields is TAGGED else ("'text' and 'label'", "")
    raise DataError(
        f"No labelled rows: they have {', '.join(map(repr, columns.all)) or 'no columns'}.",
        meaning=f"Columns such as {' '.join(known).strip()} were expected.",
        fix=f"Rename the columns, or say which are which: --set 'data.format={_example(fields)}'",
    )


def _example(fields: Mapping[str, tuple[str, ...]]) -> str:
    name = next(iter(fields))
    return f"{name}({', '.join(fields[name])})"
