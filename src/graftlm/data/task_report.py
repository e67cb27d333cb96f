"""What `graft check --task` found: rows as a task reads them, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.data.check import lengths_of
from graftlm.data.duplicates import as_ranges
from graftlm.data.records import Format, Problem, Record
from graftlm.data.report import Lengths

SHOWN = 1_500
"""Characters of the sample."""


@dataclass(frozen=True)
class Reading:
    """Records of one task, and what its own checks say of them.

    facts: name and value, such as the rows of each label. problems: those of rows that were left out, and
    doubts about what is there.
    """

    records: Sequence[Record]
    format: Format
    facts: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class TaskReport:
    """Facts about a data set as one task reads it, for people (`cli.show_task_check`) and machines.

    rows: rows in the source, broken ones included. usable: records that can be trained or evaluated on.
    repeated: numbers of rows that repeat an earlier one. sample: one record of middle length, its row beside.
    """

    source: str
    task: str
    why: str
    format: Format
    rows: int
    usable: int
    repeated: tuple[int, ...]
    facts: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]
    lengths: Lengths
    sample: str
    sample_row: int

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems for which a row was left out, or nothing can be learnt at all."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Doubts about rows that are used all the same."""
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    @property
    def ok(self) -> bool:
        """No row was left out."""
        return not self.errors

    @property
    def repeated_rows(self) -> str:
        """Row numbers for people: "3-5, 9"."""
        return as_ranges(self.repeated, 5)

    def as_dict(self) -> dict[str, object]:
        """The same for `--json`."""
        codes = sorted({problem.code for problem in self.problems})
        counts = {code: sum(problem.code == code for problem in self.problems) for code in codes}
        return {**dataclasses.asdict(self), "ok": self.ok, "counts": counts}


def task_report(
    reading: Reading,
    *,
    source: str,
    task: str,
    why: str,
    rows: int,
    broken: Sequence[Problem],
    tokenizer: Callable[..., Any] | None,
    max_length: int | None,
) -> TaskReport:
    """The report of a reading with at least one record; `broken` are the problems of reading the file.

    Without a tokenizer lengths count characters.
    """
    texts = [record.text for record in reading.records]
    if tokenizer is None:
        sizes, unit = [len(text) for text in texts], "characters"
    else:
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        sizes, unit = [len(ids) for ids in found], "tokens"
    middle = sorted(range(len(sizes)), key=lambda place: sizes[place])[len(sizes) // 2]
    first: dict[str, int] = {}
    repeated = (
        record.row
        for place, record in enumerate(reading.records)
        if first.setdefault(record.key, place) != place
    )
    problems = [*broken, *reading.problems, *_too_long(reading.records, sizes, max_length)]
    return TaskReport(
        source=source,
        task=task,
        why=why,
        format=reading.format,
        rows=rows,
        usable=len(reading.records),
        repeated=tuple(repeated),
        facts=reading.facts,
        problems=tuple(sorted(problems, key=lambda problem: (problem.severity, problem.row or 0))),
        lengths=lengths_of(sizes, unit),
        sample=texts[middle][:SHOWN],
        sample_row=reading.records[middle].row,
    )


def _too_long(records: Sequence[Record], sizes: Sequence[int], limit: int | None) -> list[Problem]:
    """Rows that no window holds, where somebody said how long windows are."""
    long = [record.row for record, size in zip(records, sizes, strict=True) if limit and size > limit]
    if not long:
        return []
    what = f"{len(long)} rows have more than {limit:,} tokens (rows {as_ranges(long)})"
    return [Problem(None, "warning", "too_long", what, "They are cut or left out; raise data.max_length.")]
