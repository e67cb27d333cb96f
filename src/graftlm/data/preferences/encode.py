"""Judged answers to token ids: the prompt once, behind it each answer as it is written after that prompt.

Rows that are too long for `max_length` (the prompt and the longest answer):

1. The oldest turns of a conversation are left out, as far as the answers then fit.
2. Else the beginning of the prompt is left out, down to half of `max_length`.
3. Else the ends of the answers are cut off. A row whose answers are then the same is dropped.

Each of these is reported with the row's number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Generic, Protocol, TypeVar

from graftlm.core.errors import DataError
from graftlm.data.branches import Branched
from graftlm.data.preferences.records import Marked, Preference
from graftlm.data.records import Example, Problem, Turn
from graftlm.data.templates import Template, TemplateName, choose_template
from graftlm.data.tokenizer import Tokenizer
from graftlm.data.tokens import Tokens, tokenise

_CHUNK = 256  # records tokenised per call: large enough for the tokenizer's own parallelism
_HALF = 2  # of max_length, at least the one part that a prompt keeps in 2.

Row = TypeVar("Row")


class Judged(Protocol):
    """A prompt and answers to it."""

    @property
    def prompt(self) -> tuple[Turn, ...]: ...
    @property
    def row(self) -> int: ...
    @property
    def examples(self) -> tuple[Example, ...]: ...


J = TypeVar("J", bound=Judged)


@dataclass(frozen=True)
class BranchEncodings(Generic[Row]):
    """All encoded rows, and what happened on the way. A problem that is an error: its row was dropped."""

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]


def encode_preferences(
    pairs: Sequence[Preference], tokenizer: Tokenizer, max_length: int, template: TemplateName = "auto"
) -> BranchEncodings[Branched]:
    """Pairs in at most `max_length` tokens each way; the answers of a row are (chosen, rejected)."""
    rows: list[Branched] = []
    problems: list[Problem] = []
    for _, found, remarks in _encoded(pairs, tokenizer, max_length, template):
        problems += remarks
        if found is not None and found.answers[0] == found.answers[1]:
            what = f"the answers are the same as far as they fit into {max_length:,} tokens"
            fix = "Raise data.max_length, or remove the row."
            problems.append(Problem(found.row, "error", "same_answers", what, fix))
        elif found is not None:
            rows.append(found)
    return BranchEncodings(tuple(rows), tuple(problems))


@dataclass(frozen=True, slots=True)
class MarkedRow:
    """One answer with its mark. `branched` has a second answer where another row's was put beside it."""

    branched: Branched
    is_good: bool

    @property
    def row(self) -> int:
        return self.branched.row

    @property
    def tokens(self) -> int:
        return self.branched.tokens

    @property
    def target_tokens(self) -> int:
        return self.branched.target_tokens

    @property
    def truncated(self) -> bool:
        return self.branched.truncated


def encode_marked(
    records: Sequence[Marked], tokenizer: Tokenizer, max_length: int, template: TemplateName = "auto"
) -> BranchEncodings[MarkedRow]:
    """A row for each marked answer, in at most `max_length` tokens."""
    rows: list[MarkedRow] = []
    problems: list[Problem] = []
    for record, found, remarks in _encoded(records, tokenizer, max_length, template):
        problems += remarks
        if found is None:
            continue
        for ids, (_, is_good) in zip(found.answers, record.answers, strict=True):
            rows.append(MarkedRow(replace(found, answers=(ids,)), is_good))
    return BranchEncodings(tuple(rows), tuple(problems))


def _encoded(
    records: Sequence[J], tokenizer: Tokenizer, max_length: int, template: TemplateName
) -> Iterator[tuple[J, Branched | None, list[Problem]]]:
    chosen = choose_template(tokenizer, template)
    for start in range(0, len(records), _CHUNK):
        some = records[start : start + _CHUNK]
        tokens = iter(
            tokenise(
                [*chain.from_iterable(record.examples for record in some)], tokenizer, chosen, "completion"
            )
        )
        for record in some:
            answers = [next(tokens) for _ in record.examples]
            yield record, *_fitted(record, answers, tokenizer, chosen, max_length)


def _fitted(
    record: Judged,
    answers: list[Tokens | DataError],
    tokenizer: Tokenizer,
    template: Template,
    max_length: int,
) -> tuple[Branched | None, list[Problem]]:
    """The row within its length, or None with the reason."""
    row = _joined(record.row, answers)
    if not isinstance(row, Branched):
        return None, [row]
    length = _length(row)
    if length <= max_length:
        return row, []
    row = replace(_with_fewer_turns(record, row, tokenizer, template, max_length), truncated=True)
    longest = max(map(len, row.answers))
    kept = max(max_length // _HALF, max_length - longest)
    prompt = row.prompt[-kept:]
    room = max_length - len(prompt)
    what = f"the row has {length:,} tokens; the beginning of its conversation is left out"
    if longest > room:
        what += ", and the end of its longest answer"
    fix = f"Raise data.max_length to {length:,} to keep all of it."
    cut = replace(row, prompt=prompt, answers=tuple(answer[:room] for answer in row.answers))
    return cut, [Problem(record.row, "warning", "row_shortened", what, fix)]


def _joined(row: int, answers: Sequence[Tokens | DataError]) -> Branched | Problem:
    """What the answers' token ids have in common before them, and what follows it in each.

    Where a tokenizer joins the end of the prompt with the beginning of an answer, that token belongs to the
    answer.
    """
    found: list[Tokens] = []
    for tokens in answers:
        if isinstance(tokens, DataError):
            what = tokens.seen.removeprefix(f"row {row}: ").rstrip(".")
            return Problem(row, "error", "template", what, tokens.fix)
        found.append(tokens)
    first = min(tokens.answers[0][0] for tokens in found)
    columns = zip(*(tokens.ids[:first] for tokens in found), strict=True)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    if not shared:
        what = "the answers have no token in common before them"
        return Problem(row, "error", "empty_prompt", what, "Give the row a prompt.")
    ids = tuple(tuple(tokens.ids[shared : tokens.answers[-1][1]]) for tokens in found)
    if not all(ids):
        return Problem(row, "error", "empty_answer", "an answer has no token", "Remove the row.")
    return Branched(tuple(found[0].ids[:shared]), ids, row, truncated=False)


def _with_fewer_turns(
    record: Judged, row: Branched, tokenizer: Tokenizer, template: Template, max_length: int
) -> Branched:
    """Without the oldest turns, down to the last one of the user, until it fits; system turns stay."""
    system = tuple(turn for turn in record.prompt if turn.role == "system")
    spoken = [turn for turn in record.prompt if turn.role != "system"]
    starts = [place for place, turn in enumerate(spoken) if turn.role == "user" and place > 0]
    last = [example.turns[-1] for example in record.examples]
    for start in starts:
        turns = (*system, *spoken[start:])
        examples = [
            replace(example, turns=(*turns, answer))
            for example, answer in zip(record.examples, last, strict=True)
        ]
        shorter = _joined(record.row, tokenise(examples, tokenizer, template, "completion"))
        if isinstance(shorter, Branched):
            row = shorter
            if _length(row) <= max_length:
                break
    return row


def _length(row: Branched) -> int:
    """Positions that the row takes: the prompt and the longest answer."""
    return len(row.prompt) + max(map(len, row.answers))
