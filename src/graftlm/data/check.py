"""Look at data before training on it: what it is, what is learnt from it, what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from graftlm.core.errors import DataError
from graftlm.data.duplicates import Duplicates, as_ranges, find_duplicates
from graftlm.data.encode import IGNORED, Encoded
from graftlm.data.records import Example, Format, Problem
from graftlm.data.report import CheckReport, Lengths
from graftlm.data.templates import TemplateName, choose_template, end_token_ids, template_digest
from graftlm.data.tokenizer import Tokenizer, end_marks
from graftlm.data.tokens import TrainOn

_BARS = 12
_SAMPLE_LIMIT = 400  # tokens or characters of one piece; the sample is for looking at
_UNUSUAL = 4.0  # times the median, and as many deviations


def check(
    train: Sequence[Example],
    held_out: Sequence[Example] = (),
    *,
    source: str,
    format: Format,
    rows: int,
    problems: Sequence[Problem] = (),
    tokenizer: Tokenizer | None = None,
    encoded: Sequence[Encoded] = (),
    encoded_held_out: Sequence[Encoded] = (),
    max_length: int = 1024,
    train_on: TrainOn = "completion",
    template: TemplateName = "auto",
) -> CheckReport:
    """Everything worth knowing about a data set. Never prints.

    `problems` are those found so far (reading, converting, encoding). `encoded` are the rows of `train`
    with `tokenizer`; without one, lengths count characters and nothing is said about end tokens.

    Raises:
        DataError: there is no row to train on, or in no row anything is trained.
    """
    if not train or (tokenizer is not None and not encoded):
        raise _nothing_to_train(source, problems, encoding=bool(train))
    found = find_duplicates(train, held_out)
    if tokenizer is None:
        facts, ends = _character_facts(train), _Ends("none (no tokenizer)", "", "", None)
        usable = len(train) + len(held_out)
    else:
        facts = _token_facts(encoded, tokenizer)
        ends, endless = _ends(encoded, train, tokenizer, template)
        usable = len({row.row for row in encoded}) + len({row.row for row in encoded_held_out})
        problems = [*problems, *endless, *_special_tokens(train, tokenizer)]
    lengths, share, sample, sample_row, sizes = facts
    short, long = _unusual(sizes)
    problems = [*problems, *_from_duplicates(found), *_all_trained(share, train, train_on)]
    return CheckReport(
        source=source,
        format=format,
        template=ends.template,
        template_digest=ends.digest,
        end_token=ends.token,
        max_length=max_length,
        train_on=train_on,
        rows=rows,
        examples=len(train) + len(held_out),
        usable=usable,
        train_rows=len(train),
        held_out_rows=len(held_out),
        problems=tuple(sorted(problems, key=lambda problem: (problem.severity, problem.row or 0))),
        lengths=lengths,
        trained_share=share,
        ends_with_end_token=ends.share,
        duplicates=found,
        short_rows=short,
        long_rows=long,
        sample=sample,
        sample_row=sample_row,
    )


Sample = tuple[tuple[str, bool], ...]
Facts = tuple[Lengths, float, Sample, int, list[tuple[int, int]]]


class _Ends(NamedTuple):
    template: str
    digest: str
    token: str
    share: float | None


def _character_facts(examples: Sequence[Example]) -> Facts:
    sizes = [(sum(len(turn.text) for turn in example.turns), example.row) for example in examples]
    trained = sum(len(turn.text) for example in examples for turn in example.turns if turn.trained)
    middle = sorted(range(len(sizes)), key=lambda index: sizes[index])[len(sizes) // 2]
    pieces: list[tuple[str, bool]] = []
    for turn in examples[middle].turns:
        heading = [] if turn.role == "text" else [(f"{turn.role}: ", False)]
        pieces += [*heading, (turn.text[:_SAMPLE_LIMIT], turn.trained), ("\n", False)]
    total = sum(size for size, _ in sizes)
    lengths = lengths_of([size for size, _ in sizes], "characters")
    return lengths, trained / max(1, total), tuple(pieces[:-1]), examples[middle].row, sizes


def _token_facts(encoded: Sequence[Encoded], tokenizer: Tokenizer) -> Facts:
    sizes = [(len(row.input_ids), row.row) for row in encoded]
    total = sum(size for size, _ in sizes)
    trained = sum(row.target_tokens for row in encoded)
    short = [row for row in encoded if not row.truncated and len(row.input_ids) <= _SAMPLE_LIMIT]
    whole = short or [row for row in encoded if not row.truncated] or list(encoded)
    typical = sorted(whole, key=lambda row: len(row.input_ids))[len(whole) // 2]
    lengths = lengths_of([size for size, _ in sizes], "tokens")
    return lengths, trained / total, sample_tokens(typical, tokenizer), typical.row, sizes


def sample_tokens(encoded: Encoded, tokenizer: Tokenizer) -> Sample:
    """The row's tokens as (text, trained); tokens that are parts of one character are joined."""
    ids = list(encoded.input_ids[:_SAMPLE_LIMIT])
    pieces: list[tuple[str, bool]] = []
    before = ""
    for stop, label in enumerate(encoded.labels[: len(ids)], start=1):
        text = str(tokenizer.decode(ids[:stop], skip_special_tokens=False))
        unfinished = text.endswith("\ufffd") and stop < len(ids)
        if unfinished or not text.startswith(before):
            continue
        if text != before:
            pieces.append((text[len(before) :], label != IGNORED))
        before = text
    return (*pieces, ("...", False)) if len(encoded.input_ids) > len(ids) else tuple(pieces)


def lengths_of(sizes: Sequence[int], unit: str) -> Lengths:
    """How long rows are; `unit` is "tokens" or "characters"."""
    ordered = sorted(sizes)

    def at(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    low, high = ordered[0], ordered[-1]
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = [0] * -(-(high - low + 1) // width)
    for size in ordered:
        counts[(size - low) // width] += 1
    bars = ((low + i * width, min(high, low + (i + 1) * width - 1), count) for i, count in enumerate(counts))
    return Lengths(
        unit="tokens" if unit == "tokens" else "characters",
        total=sum(ordered),
        smallest=low,
        median=at(0.5),
        mean=sum(ordered) / len(ordered),
        percentile_95=at(0.95),
        percentile_99=at(0.99),
        largest=high,
        histogram=tuple(bars),
    )


def _unusual(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of rows much shorter and much longer than the others (median and median deviation)."""
    ordered = sorted(size for size, _ in sizes)
    median = ordered[len(ordered) // 2]
    deviation = 1.4826 * sorted(abs(size - median) for size in ordered)[len(ordered) // 2]
    short = (row for size, row in sizes if size * _UNUSUAL < median and median - size > 2 * deviation)
    long = (row for size, row in sizes if size > _UNUSUAL * median and size - median > _UNUSUAL * deviation)
    return tuple(dict.fromkeys(short)), tuple(dict.fromkeys(long))


def _ends(
    encoded: Sequence[Encoded], train: Sequence[Example], tokenizer: Tokenizer, template: TemplateName
) -> tuple[_Ends, list[Problem]]:
    """How rows end. Rows that were cut and pieces of a text are no problem of their own."""
    chosen = choose_template(tokenizer, template)
    name = "the tokenizer's chat template" if chosen.name == "chat" else chosen.source
    ends = frozenset(end_token_ids(tokenizer, template))
    last: dict[int, bool] = {}
    for row in encoded:  # of the windows of a text the last one counts
        last[row.row] = next((label for label in reversed(row.labels) if label != IGNORED), None) in ends
    whole = {example.row for example in train if not example.continues}
    judged = [ended for row, ended in last.items() if row in whole]
    share = sum(judged) / len(judged) if judged else None
    facts = _Ends(name, template_digest(chosen), chosen.end, share)
    cut = {row.row for row in encoded if row.truncated}
    missing = [row for row, ended in last.items() if not ended and row in whole and row not in cut]
    if not ends:
        what = "neither the tokenizer nor its template has an end token; the model cannot learn to stop"
        return facts, [Problem(None, "warning", "no_end_token", what, "Set the tokenizer's eos_token.")]
    if not missing:
        return facts, []
    what = f"{len(missing)} rows do not end with an end token (rows {as_ranges(missing)})"
    fix = "The model will not learn to stop there; check the chat template."
    return facts, [Problem(None, "warning", "no_end_token", what, fix)]


def _special_tokens(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Problem]:
    marks = [mark for mark in end_marks(tokenizer) if len(mark) > 1]
    if not marks:
        return []
    pattern = re.compile("|".join(map(re.escape, marks)))
    problems = []
    for example in examples:
        match = next((hit for turn in example.turns if (hit := pattern.search(turn.text))), None)
        if match:
            what = f"the text holds {match[0]!r}, which becomes a control token"
            fix = "Remove it, or write it differently, unless you mean it."
            problems.append(Problem(example.row, "warning", "special_token", what, fix))
    return problems


def _all_trained(share: float, train: Sequence[Example], train_on: TrainOn) -> list[Problem]:
    if share < 1.0 or train_on == "all" or all(example.style == "text" for example in train):
        return []
    what = "every token is trained, the prompts too"
    return [Problem(None, "warning", "all_trained", what, "Check the roles of the turns.")]


def _from_duplicates(found: Duplicates) -> list[Problem]:
    problems = []
    if found.leaked:
        rows = as_ranges([row for row, _ in found.leaked])
        what = f"{len(found.leaked)} rows of the hold-out are (nearly) in the training part too (rows {rows})"
        fix = "Remove them from one side; scores on them measure memory."
        problems.append(Problem(None, "warning", "leak", what, fix))
    if found.contradictions:
        rows = as_ranges([row for row, _ in found.contradictions])
        what = (
            f"{len(found.contradictions)} rows answer a prompt differently than an earlier row (rows {rows})"
        )
        problems.append(
            Problem(None, "warning", "contradiction", what, "Keep one answer, if only one is right.")
        )
    return problems


def _nothing_to_train(source: str, problems: Sequence[Problem], *, encoding: bool) -> DataError:
    errors = [str(problem) for problem in problems if problem.severity == "error"]
    if encoding:
        return DataError(
            f"In no row of {source} anything is trained.",
            meaning="All answers lie beyond max_length, or the template hides them.",
            fix="Raise max_length, shorten the prompts, or check the chat template.",
            problems=errors,
        )
    return DataError(
        f"{source} has no row to train on.",
        meaning="Every row has a problem.",
        fix="Correct the rows listed above.",
        problems=errors,
    )
