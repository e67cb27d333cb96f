"""How each task reads rows for `graft check`: records, what is wrong with rows, and figures of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Literal

from graftlm.core.config import Config
from graftlm.core.errors import DataError
from graftlm.data.formats import detect, to_examples
from graftlm.data.labels.reader import LabelReader, TagReader, balance, contradictions, require_variety
from graftlm.data.labels.records import Labelled, Tagged
from graftlm.data.pair_check import source_findings, with_sources
from graftlm.data.pairs import source_text
from graftlm.data.preferences.check import mark_findings, pair_findings
from graftlm.data.preferences.rows import to_marked, to_preferences
from graftlm.data.prompts import to_prompts
from graftlm.data.records import Problem
from graftlm.data.sources import Rows
from graftlm.data.task_report import Reading
from graftlm.objectives.classification import ClassificationSettings
from graftlm.objectives.token_classification import TokenClassificationSettings
from graftlm.tasks.classification import RARE, label_names

MOST_LABELS = 40
"""Labels whose counts are told; then the most and the least frequent ones."""
OUTSIDE = "O"
"""The usual tag of a word that belongs to nothing."""

Read = Callable[[Rows, str, str, Config], Reading]
"""Rows, the format asked for, the name of their file, the task's settings -> what the task finds in them."""


def read_pairs(rows: Rows, format: str, source: str, settings: Config) -> Reading:
    """Pairs of answers to a prompt."""
    found = detect(rows.rows, format)
    pairs, problems = to_preferences(rows.rows, found, rows.numbers, source)
    facts: list[tuple[str, str]] = []
    if pairs:
        longer = fmean(len(pair.chosen.text) > len(pair.rejected.text) for pair in pairs)
        sizes = [
            fmean(len(answer.text) for answer in side)
            for side in ([p.chosen for p in pairs], [p.rejected for p in pairs])
        ]
        prompts = len({tuple(turn.text for turn in pair.prompt) for pair in pairs})
        facts += [
            ("prompts", f"{prompts:,} different ones"),
            (
                "chosen",
                f"{sizes[0]:,.0f} characters on average, longer in {longer:.0%} of pairs",
            ),
            ("rejected", f"{sizes[1]:,.0f} characters on average"),
        ]
        margins = [pair.margin for pair in pairs if pair.margin is not None]
        facts += [("margins", f"{len(margins):,} rows, {fmean(margins):.3g} on average")] if margins else []
    return Reading(pairs, found, tuple(facts), (*problems, *pair_findings(pairs)))


def read_marks(rows: Rows, format: str, source: str, settings: Config) -> Reading:
    """Answers marked good or bad."""
    found = detect(rows.rows, format)
    records, problems = to_marked(rows.rows, found, rows.numbers, source)
    marks = [is_good for record in records for _, is_good in record.answers]
    facts = (("marks", f"{sum(marks):,} good, {len(marks) - sum(marks):,} bad"),)
    return Reading(records, found, facts, (*problems, *mark_findings(records)))


def read_labels(rows: Rows, format: str, source: str, settings: Config) -> Reading:
    """Texts with labels, or with a number."""
    assert isinstance(settings, ClassificationSettings)
    named = settings.problem_type
    told = None if named == "auto" else _TOLD[named]
    reader = LabelReader(label_names(settings.labels), told)
    records, found, problems = reader(rows.rows, format, rows.numbers, source)
    if reader.told == "number":
        numbers = [record.number for record in records if record.number is not None]
        facts = (
            [("numbers", f"{min(numbers):g} to {max(numbers):g}, mean {fmean(numbers):.4g}")]
            if numbers
            else []
        )
    else:
        facts = _counts(records, reader.labels, "rows")
        problems = [*problems, *contradictions(records), *_rare(records, reader.labels)]
    one_answer = _one_answer(records, reader, source)
    return Reading(
        records, found, (("told", f"{reader.told}: {reader.why}"), *facts), (*problems, *one_answer)
    )


def read_tags(rows: Rows, format: str, source: str, settings: Config) -> Reading:
    """Words with a tag each."""
    assert isinstance(settings, TokenClassificationSettings)
    reader = TagReader(label_names(settings.labels))
    records, found, problems = reader(rows.rows, format, rows.numbers, source)
    facts = _counts(records, reader.labels, "words")
    words = sum(len(record.words) for record in records)
    outside = sum(tag == OUTSIDE for record in records for tag in record.tags)
    if records and outside == words:
        what = f"all {words:,} words are outside of everything (tag {OUTSIDE!r})"
        problems = [
            *problems,
            Problem(None, "error", "one_class", what, "Name the column that holds the tags."),
        ]
    return Reading(records, found, tuple(facts), tuple(problems))


def read_prompts(rows: Rows, format: str, source: str, settings: Config) -> Reading:
    """Prompts that the model answers itself."""
    records, found, problems = to_prompts(rows.rows, format, rows.numbers, source)
    referenced = sum(bool(record.reference.strip()) for record in records)
    facts = (
        ("references", f"{referenced:,} of {len(records):,} prompts have an answer to compare with"),
        ("columns", f"{', '.join(rows.rows[0])}: functions of rewards get them all"),
    )
    return Reading(records, found, facts, tuple(problems))


def read_sources(rows: Rows, format: str, source: str, settings: Config) -> Reading:
    """Sources and targets of an encoder-decoder."""
    found = detect(rows.rows, format)
    examples, problems = to_examples(rows.rows, found, rows.numbers, source=source)
    pairs, lacking = with_sources(examples)
    facts: list[tuple[str, str]] = []
    if pairs:
        sizes = [fmean(len(source_text(pair)) for pair in pairs), fmean(len(pair.answer) for pair in pairs)]
        several = sum(sum(turn.trained for turn in pair.turns) > 1 for pair in pairs)
        facts += [
            ("sources", f"{sizes[0]:,.0f} characters on average"),
            ("targets", f"{sizes[1]:,.0f} characters on average"),
        ]
        facts += [("conversations", f"{several:,}; their last answer is the target")] if several else []
    return Reading(pairs, found, tuple(facts), (*problems, *lacking, *source_findings(pairs)))


READINGS: Mapping[str, Read] = {
    "seq2seq": read_sources,
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo", "reward"), read_pairs),
    "kto": read_marks,
    "classification": read_labels,
    "token_classification": read_tags,
    **dict.fromkeys(("grpo", "rloo", "ppo"), read_prompts),
}
"""Tasks with a reading of their own; the others learn to write the answers of examples."""

_TOLD: Mapping[str, Literal["one label", "several labels", "number"]] = {
    "single_label_classification": "one label",
    "multi_label_classification": "several labels",
    "regression": "number",
}


def _counts(
    records: Sequence[Labelled] | Sequence[Tagged], labels: Sequence[str], what: str
) -> list[tuple[str, str]]:
    """How often each label is there, and what the most frequent one alone would score."""
    counts = sorted(balance(records, labels).items(), key=lambda item: -item[1])
    total = max(1, sum(number for _, number in counts))
    shown = counts if len(counts) <= MOST_LABELS else [*counts[:5], ("...", -1), *counts[-5:]]
    listed = ", ".join(f"{label} {number:,}" if number >= 0 else label for label, number in shown)
    share = f"{counts[0][1] / total:.1%}" if counts else "none"
    return [
        ("labels", f"{len(counts):,} ({what} of each: {listed})"),
        ("most frequent", f"{share} of the {what}: what always answering it would score"),
    ]


def _rare(records: Sequence[Labelled], labels: Sequence[str]) -> list[Problem]:
    few = [name for name, number in balance(records, labels).items() if number < RARE]
    if not few:
        return []
    shown = ", ".join(few[:10]) + (" ..." if len(few) > 10 else "")
    what = f"{len(few)} of {len(labels)} labels have fewer than {RARE} rows: {shown}"
    return [Problem(None, "warning", "rare_label", what, "Give more rows of them, or join labels.")]


def _one_answer(records: Sequence[Labelled], reader: LabelReader, source: str) -> list[Problem]:
    """That all rows have the same label is an error of the whole file."""
    assert reader.told is not None
    try:
        require_variety(records, reader.told, source)
    except DataError as error:
        return [Problem(None, "error", "one_class", error.seen.rstrip("."), error.meaning)]
    return []
