"""From a data file to encoded rows: read, detect, refuse or skip broken rows, hold out, encode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.core.errors import DataError
from graftlm.core.notices import notice
from graftlm.data.encode import Encoded, encode_examples
from graftlm.data.formats import detect, to_examples
from graftlm.data.records import Example, Format, Problem
from graftlm.data.sources import read_rows
from graftlm.data.split import split
from graftlm.training.recipe import DataSection

SHOWN = 10


@dataclass(frozen=True)
class Dataset:
    """What a run trains and is measured on."""

    path: str
    format: Format
    train: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    duplicates: int
    """Rows of the training part that repeat another one."""

    @property
    def train_tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.train)

    @property
    def target_share(self) -> float:
        """Share of the training tokens that the loss is taken over."""
        return sum(row.target_tokens for row in self.train) / max(1, self.train_tokens)

    @property
    def truncated(self) -> int:
        return sum(row.truncated for row in self.train)


@dataclass(frozen=True)
class RawDataset:
    """Examples before any tokenizer has seen them."""

    format: Format
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]

    def encoded(self, section: DataSection, tokenizer: Any) -> Dataset:
        """Token ids and labels, by the template and lengths of `section`.

        Raises:
            DataError: nothing is left to train on, or to hold out.
        """
        repeats = len(self.train) - len({example.key for example in self.train})
        train = encode(self.train, section, tokenizer, "training")
        held_out = encode(self.held_out, section, tokenizer, "held-out")
        return Dataset(section.path, self.format, train, held_out, repeats)


def read_dataset(section: DataSection, seed: int) -> RawDataset:
    """Read the data of a recipe and hold rows out; no model is needed for that.

    Raises:
        DataError: no usable rows, broken rows (all of them listed), or too few to hold any out.
    """
    examples, found = read_examples(section.path, section.format, section.bad_rows)
    if section.eval_path is None:
        train, held_out = split(examples, section.eval_fraction, seed)
    else:
        # The file of held-out rows may have a shape of its own, several references for instance.
        shape = section.format if section.format in ("auto", found.name) else "auto"
        train, held_out = examples, read_examples(section.eval_path, shape, section.bad_rows)[0]
    if not held_out:
        raise DataError(
            f"{section.path} leaves no rows to hold out.",
            meaning="Without held-out rows nobody can say whether a run helped.",
            fix="Give more rows, or held-out rows in a file of their own: --set data.eval_path=FILE",
        )
    return RawDataset(found, tuple(train), tuple(held_out))


def read_examples(path: str, format: str, bad_rows: str) -> tuple[list[Example], Format]:
    """All examples of a file; broken rows stop the run, or are skipped and said, as the recipe wants."""
    rows = read_rows(path)
    found = detect(rows.rows, format)
    examples, problems = to_examples(rows.rows, found, rows.numbers, source=Path(path).name)
    broken = [problem for problem in (*rows.problems, *problems) if problem.severity == "error"]
    if broken and (bad_rows == "stop" or not examples):
        raise DataError(
            f"{len(broken)} of {len(rows.rows) + len(rows.problems):,} rows in {path} cannot be used.",
            problems=_listed(broken),
            meaning="Training without them unasked would hide a fault in the data."
            if examples
            else "No row is left to train on.",
            fix="Correct these rows, or leave them out on purpose: --set data.bad_rows=skip"
            if examples
            else "Correct these rows; `graft check` shows what else is in the file.",
        )
    if broken:
        notice(f"Left out {_rows(len(broken))} of {path}: {'; '.join(_listed(broken))}")
    return examples, found


def encode(
    examples: Sequence[Example], section: DataSection, tokenizer: Any, part: str
) -> tuple[Encoded, ...]:
    """Token ids and labels; rows of which nothing trained is left are dropped and said.

    Raises:
        DataError: nothing is left at all.
    """
    encodings = encode_examples(examples, tokenizer, section.max_length, section.train_on, section.template)
    dropped = [problem for problem in encodings.problems if problem.severity == "error"]
    if not encodings.rows:
        raise DataError(
            f"No {part} row of {section.path} has anything to train on.",
            problems=_listed(dropped),
            meaning="Every label is masked: the answers are empty, or prompts alone fill max_length.",
            fix="Raise the limit (--set data.max_length=TOKENS), or see what `graft check` says.",
        )
    if dropped:
        notice(f"Dropped {_rows(len(dropped), part)}: {'; '.join(_listed(dropped))}")
    cut = sum(row.truncated for row in encodings.rows)
    if cut:
        notice(f"{_rows(cut, part)} cut at {section.max_length} tokens; data.max_length raises the limit.")
    return encodings.rows


def _rows(count: int, part: str = "") -> str:
    return f"{count:,} {part} row".replace("  ", " ") + ("" if count == 1 else "s")


def _listed(problems: Sequence[Problem]) -> list[str]:
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return [*(str(problem) for problem in problems[:SHOWN]), *more]
