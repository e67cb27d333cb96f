"""`task: auto`: which task a recipe means, told from the shape of its data and the kind of its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.columns import ColumnNames
from graftlm.data.formats import detect
from graftlm.data.labels.columns import LABELLED, TAGGED, labelled_columns, tagged_columns
from graftlm.data.records import Format
from graftlm.data.sources import read_rows
from graftlm.models.base_kind import BaseKind, base_kind

REPEATED = 2
"""Rows that a label has on average at least; text that hardly repeats is an answer, not a label."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Told:
    """A task, and the sentence that says why it is this one."""

    task: str
    why: str


def told(path: str, format: str, base: str | None, kind: BaseKind | None = None) -> Told:
    """The task for these data on this base.

    Words with tags are token classification, pairs of answers DPO, marked answers KTO, texts with labels
    classification; where none of that is there, an encoder-decoder learns seq2seq, and any other base sft.
    A format that the user names says what the rows are. Without a base it is taken for one that writes.
    `kind`: of the base, where it is known already.

    Raises:
        DataError: the data cannot be read; ModelError: there is no such base.
    """
    rows = read_rows(path).rows
    named = format.partition("(")[0].strip()
    if named in TAGGED or (named == "auto" and _found(tagged_columns, rows, format)):
        why = tagged_columns(rows, format).why
        return Told("token_classification", f"{why}: words with a tag each")
    if named == "auto" and (judged := _judged(rows)) is not None:
        return judged
    kind = kind or ("causal" if base is None else base_kind(base))
    if named in LABELLED or named == "auto":
        labelled = _labelled(rows, format, kind)
        if labelled is not None:
            return labelled
    if kind == "encoder-decoder":
        return Told("seq2seq", "the base reads in one half and writes in the other")
    if kind == "encoder":
        raise DataError(
            f"No labels for {base}, which only reads text: the rows have {_columns(rows)}.",
            meaning="An encoder labels texts or words; it cannot write answers.",
            fix="Name the columns, --set 'data.format=text_label(TEXT, LABEL)', or take a base that writes.",
        )
    return Told("sft", "the rows hold text to write, and the base continues text")


def _found(finder: Any, rows: Rows, format: str) -> bool:
    try:
        finder(rows, format)
    except DataError:
        return False
    return True


def _judged(rows: Rows) -> Told | None:
    """Preferences: their two tasks read different rows."""
    found = _shape(rows)
    if found is None or found.name != "preference":
        return None
    if "mark" in found.columns:
        return Told("kto", f"{found.why}: single answers, marked good or bad")
    return Told("dpo", f"{found.why}: two answers to a prompt, of which one is better")


def _labelled(rows: Rows, format: str, kind: BaseKind) -> Told | None:
    """Texts with labels. A base that writes learns to write an answer where the "labels" hardly repeat, and
    where the rows have another shape."""
    shape = _shape(rows) if format.strip() == "auto" else None
    if kind != "encoder" and shape is not None and shape.name != "text_label":
        return None
    if kind == "encoder-decoder" or not _found(labelled_columns, rows, format):
        return None
    found = labelled_columns(rows, format)
    values = [str(row.get(found.columns["label"])) for row in rows]
    if kind == "causal" and len(values) < REPEATED * len(set(values)):
        return None
    return Told("classification", f"{found.why}: texts with labels, {len(set(values)):,} different ones")


def _shape(rows: Rows) -> Format | None:
    """What the rows would be as text to write; None where they are not."""
    try:
        return detect(rows)
    except DataError:
        return None


def _columns(rows: Rows) -> str:
    return ", ".join(map(repr, ColumnNames(rows).all)) or "no columns"
