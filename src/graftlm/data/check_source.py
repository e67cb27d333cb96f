"""Everything `graft check` does, from a path to a report."""

from __future__ import annotations

from pathlib import Path

from graftlm.data.check import check
from graftlm.data.encode import Encodings, encode_examples
from graftlm.data.formats import detect, to_examples
from graftlm.data.records import Example, Format, Problem
from graftlm.data.report import CheckReport
from graftlm.data.sources import read_rows
from graftlm.data.split import split
from graftlm.data.templates import TemplateName
from graftlm.data.tokenizer import Tokenizer
from graftlm.data.tokens import TrainOn


def check_source(
    source: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    format: str = "auto",
    eval_path: str | Path | None = None,
    eval_fraction: float = 0.1,
    max_length: int = 1024,
    train_on: TrainOn = "completion",
    template: TemplateName = "auto",
    seed: int = 42,
) -> CheckReport:
    """Read `source`, hold rows out (or read them from `eval_path`), encode both parts and check them.

    Without a tokenizer nothing is encoded and the report counts characters.

    Raises:
        DataError: unreadable source, unknown shape, or nothing to train on.
    """
    examples, found, rows, problems = _load(source, format)
    if eval_path is None:
        train, held_out = split(examples, eval_fraction, seed)
    else:
        # The eval file may have a shape of its own: several references instead of one target, say.
        held_out, _, _, more = _load(eval_path, format if format in ("auto", found.name) else "auto")
        train = examples
        problems += [_of_file(problem, Path(eval_path).name) for problem in more]
    none = Encodings((), ())
    encoded, encoded_held_out = (
        encode_examples(part, tokenizer, max_length, train_on, template) if tokenizer else none
        for part in (train, held_out)
    )
    return check(
        train,
        held_out,
        source=str(source),
        format=found,
        rows=rows,
        problems=[*problems, *encoded.problems, *encoded_held_out.problems],
        tokenizer=tokenizer,
        encoded=encoded.rows,
        encoded_held_out=encoded_held_out.rows,
        max_length=max_length,
        train_on=train_on,
        template=template,
    )


def _load(source: str | Path, format: str) -> tuple[list[Example], Format, int, list[Problem]]:
    rows, numbers, broken = read_rows(source)
    found = detect(rows, format)
    examples, unusable = to_examples(rows, found, numbers, str(source))
    broken_rows = {problem.row for problem in broken if problem.severity == "error"}
    return examples, found, len(rows) + len(broken_rows), [*broken, *unusable]


def _of_file(problem: Problem, name: str) -> Problem:
    return Problem(problem.row, problem.severity, problem.code, f"{name}: {problem.what}", problem.fix)
