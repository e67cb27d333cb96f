"""Facts of rows that another trainer made: token ids and labels, as its collator hands them to the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.encode import IGNORED
from graftlm.data.templates import end_token_ids
from graftlm.diagnosis.facts.data import DataFacts
from graftlm.verbs.diagnosing.row_facts import begins_of, cuts_of, ends_of, expects_begin, masks_of
from graftlm.verbs.diagnosing.rows import View

IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
FULL = 2
"""Rows of the greatest length from which on that is taken for the limit they were cut at."""


def are_tokens(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows hold token ids and no text."""
    return bool(rows) and all(IDS in row for row in rows)


def facts_of_tokens(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], tokenizer: Any) -> DataFacts:
    """Facts of tokenised rows.

    A row without `labels` is one on which everything is trained, as trainers take it.

    Raises:
        DataError: ids and labels that are no lists of numbers, or of different lengths.
    """
    _refuse_broken(rows, numbers)
    ends = end_token_ids(tokenizer)
    found = _cut_at_limit([_view(row, number) for row, number in zip(rows, numbers, strict=True)], ends)
    lengths = [len(view.ids) for view in found]
    is_expected = expects_begin(tokenizer, is_chat=True)
    pads = {
        token for row in rows for token, seen in zip(row[IDS], row.get(MASK) or (), strict=False) if not seen
    }
    ended = ends_of(found, tokenizer, ends)
    return DataFacts(
        ends=replace(ended, pad_is_end=ended.pad_is_end or not pads.isdisjoint(ends)),
        begins=begins_of(found, tokenizer, is_expected=is_expected),
        masks=masks_of(found),
        cuts=cuts_of(found, ends, limit=max(lengths), lengths=lengths, tokenizer=tokenizer),
    )


def _refuse_broken(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> None:
    problems = [
        f"row {number}: {problem}"
        for row, number in zip(rows, numbers, strict=True)
        if (problem := _problem(row))
    ]
    if problems:
        raise DataError(
            f"{len(problems)} of {len(rows):,} tokenised rows cannot be used.",
            problems=problems[:10],
            meaning=f"Such a row holds {IDS}, and {LABELS} and {MASK} of the same length where it has them.",
            fix="Write the rows again as the trainer sees them, one JSON object a line.",
        )


def _problem(row: Mapping[str, Any]) -> str | None:
    for key in (IDS, LABELS, MASK):
        value = row.get(key)
        if value is None and key != IDS:
            continue
        if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
            return f"{key} is no list of whole numbers"
        if len(value) != len(row[IDS]):
            return f"{len(row[IDS])} {IDS} and {len(value)} {key}"
    return None


def _view(row: Mapping[str, Any], number: int) -> View:
    """Without padding, and without a label at the first token, which nothing predicts."""
    mask = row.get(MASK) or [1] * len(row[IDS])
    labels = row.get(LABELS) or row[IDS]
    seen = [(token, label) for token, label, is_seen in zip(row[IDS], labels, mask, strict=True) if is_seen]
    own = [label for _, label in seen]
    return View(tuple(token for token, _ in seen), (IGNORED, *own[1:]), number, is_cut=False)


def _cut_at_limit(found: Sequence[View], ends: Collection[int]) -> list[View]:
    """Answers that fill the limit to the last token, and do not end there, were cut.

    Rows that are trained from their beginning on are left alone: texts are cut into blocks on purpose.
    """
    longest = max(len(view.ids) for view in found)
    cut = {
        id(view)
        for view in found
        if len(view.ids) == longest
        and view.last_trained == longest - 1
        and view.labels[1] == IGNORED
        and view.labels[-1] not in ends
    }
    is_limit = len(cut) >= FULL
    return [replace(view, is_cut=is_limit and id(view) in cut) for view in found]
