"""Examples to rows of token ids and labels; nothing is lost without being listed.

Rows that are too long for `max_length`:

1. A conversation is cut after the last *whole* answer that fits.
2. If not even the first answer fits, the longest text before it loses its middle (at most half of it), so
   that the answer stays whole and its end token is learnt. Instructions stand at the beginning of a
   prompt, questions at its end: both stay.
3. Else the end of the answer is cut off. If nothing trained is left, the row is dropped.

Each of these is reported with the row's number. Plain text is cut into windows; each begins with the
last token of the one before, so that every token but the very first is predicted exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graftlm.core.errors import DataError
from graftlm.data.records import Example, Problem
from graftlm.data.templates import Template, TemplateName, choose_template
from graftlm.data.tokenizer import Tokenizer
from graftlm.data.tokens import Tokens, TrainOn, tokenise

IGNORED = -100

_CHUNK = 512  # examples tokenised per call: large enough for the tokenizer's own parallelism
_LEAST_KEPT = 0.5  # of a prompt that is shortened
_LEFT_OUT = " ... "
_ATTEMPTS = 4  # at guessing how many characters make up the tokens in excess


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row ready for a model.

    labels: as long as `input_ids`, unshifted; -100 where nothing is learnt, and always at the first
    token, which nothing predicts. truncated: something of the row was left out to make it fit.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    row: int
    truncated: bool

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return len(self.input_ids)

    @property
    def target_tokens(self) -> int:
        """Tokens the loss is taken over."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class Encodings:
    """All encoded rows, and what happened on the way."""

    rows: tuple[Encoded, ...]
    problems: tuple[Problem, ...]


def encode_example(
    example: Example,
    tokenizer: Tokenizer,
    max_length: int,
    train_on: TrainOn = "completion",
    template: TemplateName = "auto",
) -> Encoded:
    """Encode one example in at most `max_length` tokens (of long plain text: the first window).

    Raises:
        DataError: the template cannot render it, or nothing trained is left of it.
    """
    encoder = _Encoder(tokenizer, choose_template(tokenizer, template), max_length, train_on)
    rows, problems = encoder.encode([example])
    if not rows:
        raise DataError(f"Row {example.row}: {problems[0].what}.", fix=problems[0].fix)
    return rows[0]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int,
    train_on: TrainOn = "completion",
    template: TemplateName = "auto",
) -> Encodings:
    """Encode all examples in order; rows that cannot be used are dropped and listed."""
    encoder = _Encoder(tokenizer, choose_template(tokenizer, template), max_length, train_on)
    rows: list[Encoded] = []
    problems: list[Problem] = []
    for start in range(0, len(examples), _CHUNK):
        some, remarks = encoder.encode(examples[start : start + _CHUNK])
        rows += some
        problems += remarks
    return Encodings(tuple(rows), tuple(problems))


def encode_prompt(example: Example, tokenizer: Tokenizer, template: TemplateName = "auto") -> list[int]:
    """Ids of everything before the last answer, as the model gets them when it is to answer."""
    text = choose_template(tokenizer, template).prompt(example)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Tokenizer
    template: Template
    max_length: int
    train_on: TrainOn

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(
                f"max_length is {self.max_length}.",
                meaning="The first token of a row is never learnt, so a row needs two.",
                fix="Use the context length you want to train with, such as 1024.",
            )

    def encode(self, examples: Sequence[Example]) -> tuple[list[Encoded], list[Problem]]:
        rows: list[Encoded] = []
        problems: list[Problem] = []
        results = tokenise(examples, self.tokenizer, self.template, self.train_on)
        for example, tokens in zip(examples, results, strict=True):
            if isinstance(tokens, DataError):
                what = tokens.seen.removeprefix(f"row {example.row}: ").rstrip(".")
                problems.append(Problem(example.row, "error", "template", what, tokens.fix))
                continue
            if tokens.merged:
                problems.append(_merged(example.row))
            some, remark = self._fit(tokens, example)
            rows += some
            problems += [remark] if remark else []
        return rows, problems

    def _fit(self, tokens: Tokens, example: Example) -> tuple[list[Encoded], Problem | None]:
        length = len(tokens.ids)
        if example.style == "text":
            starts = range(0, max(1, length - 1), self.max_length - 1)
            windows = [_piece(tokens, start, start + self.max_length, example.row) for start in starts]
            some = [window for window in windows if window.target_tokens]
            return some, None if some else _nothing(example.row, "the text has a single token")
        if length <= self.max_length:
            row = _piece(tokens, 0, length, example.row)
            return (
                ([row], None) if row.target_tokens else ([], _nothing(example.row, "the answer has no token"))
            )
        whole = [end for _, end in tokens.answers if end <= self.max_length]
        if whole:
            row = _piece(tokens, 0, whole[-1], example.row)
            return _cut(row), _fewer_answers(example.row, length, len(whole), len(tokens.answers))
        shortened = self._with_shorter_prompt(tokens, example)
        if shortened is not None:
            row = _piece(shortened, 0, shortened.answers[0][1], example.row)
            return _cut(row), _shorter_prompt(example.row, length)
        first = tokens.answers[0][0]
        if first < self.max_length:
            return _cut(_piece(tokens, 0, self.max_length, example.row)), _cut_answer(example.row, length)
        what = f"the answer begins at token {first + 1:,}, beyond max_length {self.max_length:,}"
        return [], _nothing(example.row, what, f"Raise max_length to {length:,}, or shorten the prompt.")

    def _with_shorter_prompt(self, tokens: Tokens, example: Example) -> Tokens | None:
        """The tokens up to the first answer, with the longest text before it shortened; or None."""
        first = next(index for index, turn in enumerate(example.turns) if turn.trained)
        before = range(first)
        if not before or tokens.answers[0][1] - tokens.answers[0][0] >= self.max_length:
            return None
        longest = max(before, key=lambda index: len(example.turns[index].text))
        text = example.turns[longest].text
        density = len(text) / max(1, tokens.answers[0][0])
        kept = len(text)
        end = tokens.answers[0][1]
        for _ in range(_ATTEMPTS):
            kept -= int((end - self.max_length) * density * 1.05) + 4
            if kept < _LEAST_KEPT * len(text):
                return None
            turns = list(example.turns[: first + 1])
            turns[longest] = replace(turns[longest], text=_without_middle(text, kept))
            candidate = replace(example, turns=tuple(turns))
            result = tokenise([candidate], self.tokenizer, self.template, self.train_on)[0]
            if isinstance(result, DataError):
                return None
            end = result.answers[0][1]
            if end <= self.max_length:
                return result
        return None


def _without_middle(text: str, length: int) -> str:
    """The beginning and the end of a text, `length` characters in all, with a mark between them."""
    half = (length - len(_LEFT_OUT)) // 2
    return f"{text[:half].rstrip()}{_LEFT_OUT}{text[len(text) - half :].lstrip()}"


def _piece(tokens: Tokens, start: int, stop: int, row: int) -> Encoded:
    stop = min(stop, len(tokens.ids))
    ids = tuple(tokens.ids[start:stop])
    flags = tokens.trained[start:stop]
    labels = [token if trained else IGNORED for token, trained in zip(ids, flags, strict=True)]
    labels[:1] = [IGNORED]
    return Encoded(ids, tuple(labels), row, truncated=False)


def _cut(row: Encoded) -> list[Encoded]:
    return [replace(row, truncated=True)]


def _merged(row: int) -> Problem:
    what = "a token joins the end of the prompt with the beginning of the answer"
    fix = "End prompts with a line break, or begin answers with a space."
    return Problem(row, "warning", "merged_boundary", what, fix)


def _fewer_answers(row: int, length: int, fit: int, answers: int) -> Problem:
    what = f"the conversation has {length:,} tokens; {fit} of its {answers} answers fit"
    return Problem(row, "warning", "conversation_shortened", what, f"Raise max_length to {length:,} for all.")


def _shorter_prompt(row: int, length: int) -> Problem:
    what = f"the row has {length:,} tokens; the middle of its prompt is left out so that the answer fits"
    return Problem(row, "warning", "prompt_shortened", what, f"Raise max_length to {length:,} to keep it.")


def _cut_answer(row: int, length: int) -> Problem:
    what = f"the answer is cut off: the row has {length:,} tokens"
    fix = f"Raise max_length to {length:,}; a cut answer does not teach where to stop."
    return Problem(row, "warning", "answer_truncated", what, fix)


def _nothing(row: int, what: str, fix: str = "Remove the row.") -> Problem:
    return Problem(row, "error", "nothing_trained", f"nothing to learn: {what}", fix)
