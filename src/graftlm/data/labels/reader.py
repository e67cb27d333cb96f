"""From raw rows to labelled records: the labels of the first file are the labels of all."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.conversion import RowError, text_of
from graftlm.data.labels.columns import labelled_columns, tagged_columns
from graftlm.data.labels.records import JOINED, Labelled, Tagged
from graftlm.data.labels.values import Problem as Told
from graftlm.data.labels.values import in_order, mark_width, name_of, names_of, number_of, problem_of
from graftlm.data.records import Format, Problem

Row = Mapping[str, Any]
Read = tuple[list[Any], Format, list[Problem]]
"""Records, the shape that was found, and what is wrong with rows."""


class LabelReader:
    """Reads texts with labels; remembers which labels there are.

    >>> reader = LabelReader()
    >>> rows = [{"text": "Fine.", "label": 1}, {"text": "Bad.", "label": 0}]
    >>> records, _, _ = reader(rows, "auto", [1, 2], "x.jsonl")
    >>> reader.labels, records[0].labels
    (('0', '1'), ('1',))
    """

    def __init__(self, labels: Sequence[str] = (), told: Told | None = None) -> None:
        self.labels, self.told = tuple(labels), told
        self.is_closed = bool(labels)
        """Whether another label than these is an error."""
        self.why = "the recipe says so"

    def __call__(self, rows: Sequence[Row], format: str, numbers: Sequence[int], source: str) -> Read:
        """Records of the rows that can be used.

        Raises:
            DataError: there are no such columns.
        """
        found = labelled_columns(rows, format)
        cells = [row.get(found.columns["label"]) for row in rows]
        if self.told is None:
            self.told, self.why = problem_of(cells)
        width = mark_width(cells, self.labels) if self.told == "several labels" else None
        if width and not self.labels:
            self.labels = tuple(map(str, range(width)))
            self.is_closed = True
        records: list[Labelled] = []
        problems: list[Problem] = []
        for row, number in zip(rows, numbers, strict=True):
            try:
                records.append(self._record(row, found, number, source, marks=bool(width)))
            except RowError as error:
                problems.append(Problem(number, "error", error.code, str(error), error.fix))
        if self.told != "number" and not self.is_closed:
            self.labels = in_order(name for record in records for name in record.labels)
            self.is_closed = True
        return records, found, problems

    def _record(self, row: Row, found: Format, number: int, source: str, *, marks: bool) -> Labelled:
        columns = [found.columns[field] for field in ("text", "text_pair") if field in found.columns]
        texts = tuple(text_of(row.get(column), column, "the text") for column in columns)
        label = found.columns["label"]
        value = row.get(label)
        if self.told == "number":
            return Labelled(texts, (), number, source, number_of(value, label))
        if self.told == "several labels":
            names = names_of(value, label, self.labels, marks=marks)
        else:
            names = (name_of(value, label),)
        return Labelled(texts, tuple(self._known(name, label) for name in names), number, source)

    def _known(self, name: str, column: str) -> str:
        """The label of that name, or of that number where labels have names."""
        return known_label(name, column, self.labels) if self.is_closed else name


class TagReader:
    """Reads words with a tag each; remembers which tags there are."""

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels, self.is_closed = tuple(labels), bool(labels)

    def __call__(self, rows: Sequence[Row], format: str, numbers: Sequence[int], source: str) -> Read:
        """Records of the rows that can be used; errors as of `LabelReader`."""
        found = tagged_columns(rows, format)
        records: list[Tagged] = []
        problems: list[Problem] = []
        for row, number in zip(rows, numbers, strict=True):
            try:
                records.append(self._record(row, found, number, source))
            except RowError as error:
                problems.append(Problem(number, "error", error.code, str(error), error.fix))
        if not self.is_closed:
            self.labels = in_order(tag for record in records for tag in record.tags)
            self.is_closed = True
        return records, found, problems

    def _record(self, row: Row, found: Format, number: int, source: str) -> Tagged:
        words, tags = row.get(found.columns["words"]), row.get(found.columns["tags"])
        if not isinstance(words, list) or not isinstance(tags, list) or not words:
            raise RowError("no_list", "words and tags are not both lists that hold something", "Write lists.")
        if len(words) != len(tags):
            raise RowError(
                "uneven", f"{len(words)} words have {len(tags)} tags", "Give every word exactly one tag."
            )
        texts = tuple(text_of(word, found.columns["words"], "a word") for word in words)
        names = (name_of(tag, found.columns["tags"]) for tag in tags)
        column = found.columns["tags"]
        known = tuple(known_label(name, column, self.labels) if self.is_closed else name for name in names)
        return Tagged(texts, known, number, source)


def known_label(name: str, column: str, labels: Sequence[str]) -> str:
    """One of the labels, by its name, or by its number where no label is called by a number.

    Raises:
        RowError: there is no such label; the nearest is named.

    >>> known_label("1", "label", ("ham", "spam"))
    'spam'
    """
    if name in labels:
        return name
    if name.isdigit() and int(name) < len(labels) and not any(label.isdigit() for label in labels):
        return labels[int(name)]
    near = difflib.get_close_matches(name, labels, n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RowError(
        "unknown_label",
        f"the label {name!r} ({column!r}) is none of the {len(labels)} labels{hint}",
        "Correct it, or add it to the labels: --set task.labels=FILE",
    )


def require_variety(records: Sequence[Labelled], told: Told, path: str) -> None:
    """Refuse training data that say the same of every row.

    Raises:
        DataError: one class, one number, or no label at all.
    """
    answers = {(record.labels, record.number) for record in records}
    if len(answers) > 1 or not records:
        return
    what, said = "number" if told == "number" else "label", records[0].answer or "none"
    raise DataError(
        f"All {len(records):,} training rows of {path} have the {what} {said!r}.",
        meaning="From one class alone nothing can be learnt: the answer is always the same.",
        fix="Give rows of the other classes, or name the column that holds the labels: "
        "--set 'data.format=text_label(TEXT, LABEL)'",
    )


def balance(records: Sequence[Labelled | Tagged], labels: Sequence[str]) -> dict[str, int]:
    """How many rows (or words) have each label.

    >>> balance([Labelled(("a",), ("x",), 1), Labelled(("b",), ("x",), 2)], ("x", "y"))
    {'x': 2, 'y': 0}
    """
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.tags if isinstance(record, Tagged) else record.labels)
    return {label: counts[label] for label in labels}


def contradictions(records: Sequence[Labelled]) -> list[Problem]:
    """Rows that repeat the text of another one with another label, as warnings."""
    first: dict[str, Labelled] = {}
    found = []
    for record in records:
        known = first.setdefault(record.key, record)
        if known.answer != record.answer:
            what = f"the text of row {known.row} with another label ({_named(known)}, here {_named(record)})"
            fix = "Decide which of them is right."
            found.append(Problem(record.row, "warning", "contradiction", what, fix))
    return found


def _named(record: Labelled) -> str:
    return repr(record.answer.replace(JOINED, ", "))
