"""What `graft check` found, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftlm.data.duplicates import Duplicates, as_ranges
from graftlm.data.records import Format, Problem


@dataclass(frozen=True)
class Lengths:
    """Lengths of rows, in `unit`; histogram: (from, to, rows), both ends included."""

    unit: Literal["tokens", "characters"]
    total: int
    smallest: int
    median: int
    mean: float
    percentile_95: int
    percentile_99: int
    largest: int
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class CheckReport:
    """Facts about a data set, for people (`graftlm.cli.show_check`) and machines (`as_dict`).

    rows: rows in the source, broken ones included. examples: what they became. usable: examples that can
    be trained or evaluated on. trained_share: part of all tokens the loss is taken over.
    ends_with_end_token: part of the training rows whose last trained token is an end token (None
    without a tokenizer). short_rows, long_rows: numbers of rows of unusual length.
    sample: pieces of one row as (text, trained); its number is `sample_row`.
    """

    source: str
    format: Format
    template: str
    template_digest: str
    end_token: str
    max_length: int
    train_on: str
    rows: int
    examples: int
    usable: int
    train_rows: int
    held_out_rows: int
    problems: tuple[Problem, ...]
    lengths: Lengths
    trained_share: float
    ends_with_end_token: float | None
    duplicates: Duplicates
    short_rows: tuple[int, ...]
    long_rows: tuple[int, ...]
    sample: tuple[tuple[str, bool], ...]
    sample_row: int

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems for which a row was left out."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems with rows that are used all the same."""
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    @property
    def ok(self) -> bool:
        """No row was left out, and nothing of the hold-out was trained on."""
        return not self.errors and not self.duplicates.leaked

    def count(self, code: str) -> int:
        """Problems of one kind, such as `answer_truncated`, `nothing_trained`, `empty_answer`."""
        return sum(problem.code == code for problem in self.problems)

    def ranges(self, rows: Sequence[int], limit: int = 8) -> str:
        """Row numbers for people: "3-5, 9"."""
        return as_ranges(rows, limit)

    def as_dict(self) -> dict[str, object]:
        """The same for `--json`."""
        facts: dict[str, object] = dataclasses.asdict(self)
        codes = sorted({problem.code for problem in self.problems})
        return {**facts, "ok": self.ok, "counts": {code: self.count(code) for code in codes}}
