"""From a data file to the rows of a task: read, detect, refuse or skip broken rows, hold out, encode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from graftlm.core.errors import ConfigError, DataError
from graftlm.core.notices import notice
from graftlm.data.encode import Encoded, encode_examples
from graftlm.data.formats import detect, to_examples
from graftlm.data.records import Example, Format, Problem, Record
from graftlm.data.sources import read_rows
from graftlm.data.split import split
from graftlm.training.recipe import DataSection

SHOWN = 10

X = TypeVar("X", bound=Record)


class Row(Protocol):
    """What every encoded row can say of itself. `tokens`: in all; `target_tokens`: those with a loss."""

    @property
    def row(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def target_tokens(self) -> int: ...
    @property
    def truncated(self) -> bool: ...


R = TypeVar("R", bound=Row, covariant=True)


@dataclass(frozen=True)
class Dataset(Generic[R]):
    """What a run trains and is measured on."""

    path: str
    format: Format
    train: tuple[R, ...]
    held_out: tuple[R, ...]
    duplicates: int
    """Rows of the training part that repeat another one."""

    @property
    def train_tokens(self) -> int:
        return sum(row.tokens for row in self.train)

    @property
    def target_share(self) -> float:
        """Share of the training tokens that the loss is taken over."""
        return sum(row.target_tokens for row in self.train) / max(1, self.train_tokens)

    @property
    def truncated(self) -> int:
        return sum(row.truncated for row in self.train)


@dataclass(frozen=True)
class RawDataset(Generic[X]):
    """Records before any tokenizer has seen them."""

    format: Format
    train: tuple[X, ...]
    held_out: tuple[X, ...]

    @property
    def repeats(self) -> int:
        """Rows of the training part that repeat another one."""
        return len(self.train) - len({record.key for record in self.train})


@dataclass(frozen=True)
class Converted(Generic[X]):
    """The records of a file, the shape that was found, and what was wrong with its rows."""

    records: Sequence[X]
    format: Format
    problems: Sequence[Problem]


Convert = Callable[[Sequence[Mapping[str, Any]], str, Sequence[int], str], Converted[X]]
"""Raw rows, the format asked for (`auto` or a name), the rows' numbers, the name of their file -> records.
Rows that cannot be used are left out and listed as errors."""


def to_texts(
    rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
) -> Converted[Example]:
    """Examples of text to write, in any of the known shapes."""
    found = detect(rows, format)
    examples, problems = to_examples(rows, found, numbers, source=source)
    return Converted(examples, found, problems)


def read_split(section: DataSection, seed: int, convert: Convert[X]) -> RawDataset[X]:
    """Read the data of a recipe and hold rows out; no model is needed for that.

    Raises:
        DataError: no usable rows, broken rows (all of them listed), or too few to hold any out.
    """
    records, found = read_records(section.path, section.format, section.bad_rows, convert)
    if section.eval_path is None:
        train, held_out = split(records, section.eval_fraction, seed, together=section.hold_out)
    else:
        train, held_out = records, held_out_records(section.eval_path, section, convert)[0]
    if not held_out:
        raise DataError(
            f"{section.path} leaves no rows to hold out.",
            meaning="Without held-out rows nobody can say whether a run helped.",
            fix="Give more rows, or held-out rows in a file of their own: --set data.eval_path=FILE",
        )
    return RawDataset(found, tuple(train), tuple(held_out))


def held_out_records(path: str, section: DataSection, convert: Convert[X]) -> tuple[list[X], Format]:
    """All records of a file of held-out rows, read as the recipe says: it may have other columns than the
    training file, several references for instance, and is then told by its own."""
    try:
        return read_records(path, section.format, section.bad_rows, convert)
    except ConfigError as error:  # columns were named, and they are not there
        notice(f"{path}: {error.seen} Its rows are read by the columns they have.")
        return read_records(path, "auto", section.bad_rows, convert)


def read_records(path: str, format: str, bad_rows: str, convert: Convert[X]) -> tuple[list[X], Format]:
    """All records of a file; broken rows stop the run, or are skipped and said, as the recipe wants."""
    rows = read_rows(path)
    converted = convert(rows.rows, format, rows.numbers, Path(path).name)
    records = list(converted.records)
    found = (*rows.problems, *converted.problems)
    broken = [problem for problem in found if problem.severity == "error"]
    if broken and (bad_rows == "stop" or not records):
        raise DataError(
            f"{len(broken)} of {len(rows.rows) + len(rows.problems):,} rows in {path} cannot be used.",
            problems=listed(broken),
            meaning="Training without them unasked would hide a fault in the data."
            if records
            else "No row is left to train on.",
            fix="Correct these rows, or leave them out on purpose: --set data.bad_rows=skip"
            if records
            else "Correct these rows; `graft check` shows what else is in the file.",
        )
    if broken:
        notice(f"Left out {counted(len(broken))} of {path}: {'; '.join(listed(broken))}")
    return records, converted.format


def encode(
    examples: Sequence[Example], section: DataSection, tokenizer: Any, part: str
) -> tuple[Encoded, ...]:
    """Token ids and labels; rows of which nothing trained is left are dropped and said.

    Raises:
        DataError: nothing is left at all.
    """
    found = encode_examples(examples, tokenizer, section.max_length, section.train_on, section.template)
    return kept(found.rows, found.problems, section, part)


def kept(rows: tuple[R, ...], problems: Sequence[Problem], section: DataSection, part: str) -> tuple[R, ...]:
    """The encoded rows; what was dropped or cut on the way is said. `part`: "training", "held-out".

    Raises:
        DataError: nothing is left at all.
    """
    dropped = [problem for problem in problems if problem.severity == "error"]
    if not rows:
        raise DataError(
            f"No {part} row of {section.path} has anything to train on.",
            problems=listed(dropped),
            meaning="Every label is masked: the answers are empty, or prompts alone fill max_length.",
            fix="Raise the limit (--set data.max_length=TOKENS), or see what `graft check` says.",
        )
    if dropped:
        notice(f"Dropped {counted(len(dropped), part)}: {'; '.join(listed(dropped))}")
    cut = sum(row.truncated for row in rows)
    if cut:
        notice(f"{counted(cut, part)} cut at {section.max_length} tokens; data.max_length raises the limit.")
    return rows


def counted(count: int, part: str = "") -> str:
    """How many rows, in words."""
    return f"{count:,} {part} row".replace("  ", " ") + ("" if count == 1 else "s")


def listed(problems: Sequence[Problem]) -> list[str]:
    """The first problems, and how many more there are."""
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return [*(str(problem) for problem in problems[:SHOWN]), *more]
