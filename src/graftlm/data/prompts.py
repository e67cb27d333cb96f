"""Prompts that a model answers by itself, with a reference to judge by where the data have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.columns import FINDERS, ColumnNames, has
from graftlm.data.conversion import RowError, text_of, turns_of
from graftlm.data.formats import detect, to_examples
from graftlm.data.records import SPOKEN_BY_MODEL, Example, Format, Problem, Turn
from graftlm.data.templates import TemplateName, choose_template
from graftlm.data.tokenizer import Tokenizer

PROMPTS = "prompts"
"""The name of this shape."""
_ASKED = ("prompt", "question", "problem", "query", "instruction", "messages")
_JUDGED_BY = ("reference", "answer", "solution", "ground_truth", "completion", "response", "target", "label")
_NO_ANSWER = "?"
"""Stands where templates want an answer; nothing reads it."""

_NOT_ASKED = ("preference", "text")
"""Shapes without a question."""

Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, as one row of data has it.

    example: the question as turns, ending in an answer: the reference, or a stand-in. reference: what a right
    answer says, "" where the data do not tell. columns: the whole row, for functions that judge answers.
    is_chat: whether the data wrote the question as messages.
    """

    example: Example
    reference: str
    columns: Mapping[str, Any]
    is_chat: bool

    @property
    def row(self) -> int:
        """Its 1-based number in the file."""
        return self.example.row

    @property
    def key(self) -> str:
        """Its content without letter case and spacing."""
        return self.example.key

    @property
    def text(self) -> str:
        """All of its text."""
        return self.example.text

    @property
    def asked(self) -> str | Chat:
        """The question as its row has it: a text, or messages."""
        before = self.example.turns[:-1]
        if not self.is_chat:
            return before[-1].text
        return [{"role": turn.role, "content": turn.text} for turn in before]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt ready for a model, and what its answers are judged by. Nothing in it is learnt."""

    input_ids: tuple[int, ...]
    row: int
    prompt: Prompt

    @property
    def labels(self) -> tuple[int, ...]:
        """As every encoded row: -100 throughout."""
        return (-100,) * len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return len(self.input_ids)

    @property
    def target_tokens(self) -> int:
        """None: what is learnt is written while training."""
        return 0

    @property
    def truncated(self) -> bool:
        """Prompts are left out rather than cut: half a question has another answer."""
        return False


def to_prompts(
    rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
) -> tuple[list[Prompt], Format, list[Problem]]:
    """Prompts of any of the known shapes, or of rows that only ask.

    Rows that cannot be used are left out and listed, each with its number.

    Raises:
        DataError: no column asks anything.

    >>> found, shape, _ = to_prompts([{"question": "2+2?", "answer": "4", "level": 1}], "auto", [1], "")
    >>> found[0].asked, found[0].reference, found[0].columns["level"], shape.name
    ('2+2?', '4', 1, 'question_answer')
    >>> found, shape, _ = to_prompts([{"prompt": "Say something short."}], "auto", [1], "")
    >>> found[0].reference, shape.name
    ('', 'prompts')
    """
    shape = _only_asked(ColumnNames(rows)) if format.strip() in ("auto", PROMPTS) else None
    if shape is None:
        return _answered(rows, format, numbers, source)
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for number, row in zip(numbers, rows, strict=True):
        try:
            prompts.append(_prompt(row, shape.columns, number, source))
        except RowError as error:
            problems.append(Problem(number, "error", error.code, str(error), error.fix))
    return prompts, shape, problems


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, longest: int, template: TemplateName = "auto"
) -> tuple[tuple[EncodedPrompt, ...], list[Problem]]:
    """Token ids up to where the answer begins; prompts of over `longest` tokens are left out and listed."""
    chosen = choose_template(tokenizer, template)
    encoded: list[EncodedPrompt] = []
    problems: list[Problem] = []
    for prompt in prompts:
        text = chosen.prompt(prompt.example)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > longest:
            what = f"the prompt has {len(ids):,} tokens; {longest:,} leave room for the answer"
            fix = "Raise data.max_length, lower task.max_completion_length, or remove the row."
            problems.append(Problem(prompt.row, "error", "long_prompt", what, fix))
        else:
            encoded.append(EncodedPrompt(tuple(ids), prompt.row, prompt))
    return tuple(encoded), problems


def _only_asked(columns: ColumnNames) -> Format | None:
    """The shape of rows that only ask; None where a known shape has question and answer, or nothing asks."""
    asked = columns.find(*_ASKED)
    if asked is None:
        return None
    known = next((found for finder in FINDERS if (found := finder(columns)) is not None), None)
    # A list of messages under `prompt` is no text: the known shapes would refuse every row.
    if not isinstance(columns.sample(asked), list) and known and known.name not in _NOT_ASKED:
        return None
    judged_by = next((name for each in _JUDGED_BY if (name := columns.find(each)) and name != asked), None)
    named = {"prompt": asked} | ({"reference": judged_by} if judged_by else {})
    return Format(PROMPTS, named, has(named))


def _prompt(row: Mapping[str, Any], columns: Mapping[str, str], number: int, source: str) -> Prompt:
    asked, judged_by = row.get(columns["prompt"]), row.get(columns.get("reference", ""))
    reference = "" if judged_by is None or isinstance(judged_by, list | Mapping) else str(judged_by)
    is_chat = isinstance(asked, list)
    if is_chat:
        turns = turns_of(asked, columns["prompt"])
        if turns[-1].role in SPOKEN_BY_MODEL:
            reference = reference or turns[-1].text
            turns = turns[:-1]
        if not turns:
            raise RowError("empty_prompt", "nothing is asked before the answer", "Remove the row.")
    else:
        turns = [Turn("user", text_of(asked, columns["prompt"], "the prompt"), trained=False)]
    before = tuple(Turn(turn.role, turn.text, trained=False) for turn in turns)
    answer = Turn("assistant", reference or _NO_ANSWER, trained=True)
    example = Example((*before, answer), number, source, "chat" if is_chat else "completion")
    return Prompt(example, reference, row, is_chat)


def _answered(
    rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
) -> tuple[list[Prompt], Format, list[Problem]]:
    """Questions with their answers, in any of the shapes that supervised tuning reads."""
    shape = detect(rows, format)
    if shape.name in _NOT_ASKED:
        raise DataError(
            f"Nothing is asked in {source}: {shape.why}.",
            meaning="A policy answers prompts; it needs a question in each row, and perhaps a right answer.",
            fix="Give rows with 'prompt', and 'answer' where a reward compares with one.",
        )
    examples, problems = to_examples(rows, shape, numbers, source)
    by_number = dict(zip(numbers, rows, strict=True))
    is_chat = shape.name in ("messages", "sharegpt")
    prompts = [Prompt(each, each.answer, by_number[each.row], is_chat) for each in examples]
    return prompts, shape, problems
