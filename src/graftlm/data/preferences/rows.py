"""Rows of a file to preference pairs or marked answers; rows that cannot be used are listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from graftlm.core.errors import DataError
from graftlm.data.conversion import RowError, dialogue, text_of, tools_text, turns_of
from graftlm.data.preferences.records import Marked, Preference
from graftlm.data.records import SPOKEN_BY_MODEL, Format, Problem, Style, Turn

Row = Mapping[str, Any]
Columns = Mapping[str, str]
R = TypeVar("R")

SCORES = ("chosen_score", "rejected_score")
_DIALOGUE = ("\n\nHuman:", "Human:")


def to_preferences(
    rows: Sequence[Row], format: Format, numbers: Sequence[int], source: str = ""
) -> tuple[list[Preference], list[Problem]]:
    """Pairs of every row in a `preference` format.

    Known shapes: a prompt (text or turns) with two answers (texts, or turns); two whole conversations, as
    turns or as HH-RLHF text, of which the common beginning is the prompt; two texts that begin alike.

    Raises:
        DataError: the rows hold no pairs.

    >>> found = Format("preference", {name: name for name in ("prompt", "chosen", "rejected")}, "")
    >>> pairs, problems = to_preferences([{"prompt": "2+2?", "chosen": "4", "rejected": "5"}], found, [1])
    >>> pairs[0].chosen.text, pairs[0].rejected.text, problems
    ('4', '5', [])
    """
    if format.name != "preference" or "mark" in format.columns:
        raise _no_pairs(format)
    return _each(rows, numbers, format, lambda row, number: _pair(row, format.columns, number, source))


def to_marked(
    rows: Sequence[Row], format: Format, numbers: Sequence[int], source: str = ""
) -> tuple[list[Marked], list[Problem]]:
    """Marked answers of every row in a `preference` format; of a pair, both.

    Raises:
        DataError: the rows hold neither marks nor pairs.

    >>> found = Format("preference", {"prompt": "prompt", "completion": "completion", "mark": "label"}, "")
    >>> marked, _ = to_marked([{"prompt": "2+2?", "completion": "4", "label": True}], found, [1])
    >>> [(answer.text, is_good) for answer, is_good in marked[0].answers]
    [('4', True)]
    """
    if format.name != "preference":
        raise _no_pairs(format)
    columns = format.columns
    if "mark" in columns:
        return _each(rows, numbers, format, lambda row, number: _marked(row, columns, number, source))
    pairs = _each(rows, numbers, format, lambda row, number: _pair(row, columns, number, source))
    return [Marked.of_pair(pair) for pair in pairs[0]], pairs[1]


def _each(
    rows: Sequence[Row], numbers: Sequence[int], format: Format, convert: Callable[[Row, int], R]
) -> tuple[list[R], list[Problem]]:
    records: list[R] = []
    problems = list(format.problems)
    for row, number in zip(rows, numbers, strict=True):
        try:
            records.append(convert(row, number))
        except RowError as error:
            problems.append(Problem(number, "error", error.code, str(error), error.fix))
    return records, problems


def _pair(row: Row, columns: Columns, number: int, source: str) -> Preference:
    prompt, chosen, rejected, style = _sides(row, columns)
    prompt = _with_system(prompt, row, columns)
    better, worse = _answer(chosen, columns["chosen"]), _answer(rejected, columns["rejected"])
    if not any(turn.text.strip() for turn in prompt):
        raise RowError("empty_prompt", "the prompt is empty", "Fill it in or remove the row.")
    if " ".join(better.text.split()) == " ".join(worse.text.split()):
        raise RowError("same_answers", "the chosen and the rejected answer are the same", "Remove the row.")
    tools = tools_text(row.get(columns["tools"])) if "tools" in columns else ""
    margin = _margin(row, columns)
    return Preference(_untrained(prompt), better, worse, number, source, style, tools, margin)


def _marked(row: Row, columns: Columns, number: int, source: str) -> Marked:
    mark = row.get(columns["mark"])
    if not isinstance(mark, bool):
        what = f"the mark ({columns['mark']!r}) is {mark!r}, not true or false"
        raise RowError("no_mark", what, "Write true for a good answer, false for a bad one.")
    if "messages" in columns:
        turns = turns_of(row.get(columns["messages"]), columns["messages"])
        prompt, answer = turns[:-1], turns[-1:]
    else:
        prompt = _prompt(row.get(columns["prompt"]), columns["prompt"])
        answer = _turns(row.get(columns["completion"]), columns["completion"])
    prompt = _with_system(prompt, row, columns)
    if not any(turn.text.strip() for turn in prompt):
        raise RowError("empty_prompt", "the prompt is empty", "Fill it in or remove the row.")
    last = _answer(answer, columns.get("messages") or columns["completion"])
    tools = tools_text(row.get(columns["tools"])) if "tools" in columns else ""
    return Marked(_untrained(prompt), ((last, mark),), number, source, "chat", tools)


def _sides(row: Row, columns: Columns) -> tuple[list[Turn], list[Turn], list[Turn], Style]:
    """The turns before the answers, and those of each answer."""
    names = columns["chosen"], columns["rejected"]
    cells = [row.get(name) for name in names]
    prompt = _prompt(row.get(columns["prompt"]), columns["prompt"]) if "prompt" in columns else []
    if all(isinstance(cell, str | None) for cell in cells):
        texts = [text_of(cell, name, "the answer") for cell, name in zip(cells, names, strict=True)]
        given = row.get(columns["prompt"]) if prompt else None
        if isinstance(given, str) and all(text.startswith(given) for text in texts):
            texts = [text[len(given) :].lstrip() for text in texts]  # answers that repeat their prompt
        elif all(text.startswith(_DIALOGUE) for text in texts):
            return (*_parted(*(dialogue(text) for text in texts)), "chat")
        if not prompt and "prompt" in columns:
            raise RowError("empty_prompt", "the prompt is empty", "Fill it in or remove the row.")
        if not prompt:
            return _parted_texts(*texts)
        chosen, rejected = ([Turn("assistant", text, trained=True)] for text in texts)
        return prompt, chosen, rejected, "chat"
    sides = [_turns(cell, name) for cell, name in zip(cells, names, strict=True)]
    whole = [side if _begins(side, prompt) else [*prompt, *side] for side in sides]
    return (*_parted(*whole), "chat")


def _prompt(value: Any, column: str) -> list[Turn]:
    if isinstance(value, str) and value.startswith(_DIALOGUE):
        turns = dialogue(value)
        return turns if turns[-1].text else turns[:-1]  # it ends in "Assistant:"
    return _turns(value, column, "user") if value else []


def _turns(value: Any, column: str, role: str = "assistant") -> list[Turn]:
    if isinstance(value, str):
        return [Turn(role, value, trained=role == "assistant")]
    return turns_of([value] if isinstance(value, Mapping) else value, column)


def _begins(side: Sequence[Turn], prompt: Sequence[Turn]) -> bool:
    return bool(prompt) and len(side) > len(prompt) and _same(side, prompt) == len(prompt)


def _same(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """How many turns two conversations have in common at their beginning."""
    pairs = [(turn.role, turn.text) == (that.role, that.text) for turn, that in zip(one, other, strict=False)]
    return pairs.index(False) if False in pairs else len(pairs)


def _parted(one: list[Turn], other: list[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """Two conversations: what they begin with alike, and how each of them goes on."""
    common = _same(one, other)
    if common == len(one) == len(other):
        raise RowError("same_answers", "the chosen and the rejected answer are the same", "Remove the row.")
    return one[:common], one[common:], other[common:]


def _parted_texts(one: str, other: str) -> tuple[list[Turn], list[Turn], list[Turn], Style]:
    """Two texts that begin alike: the prompt ends at the last white space before they part."""
    pairs = enumerate(zip(one, other, strict=False))
    parting = next((place for place, (letter, that) in pairs if letter != that), min(len(one), len(other)))
    end = max((place + 1 for place in range(parting) if one[place].isspace()), default=0)
    if not one[:end].strip():
        what = "the answers have no beginning in common that could be their prompt"
        raise RowError("no_prompt", what, "Add a 'prompt' column.")
    sides = [[Turn("assistant", text[end:], trained=True)] for text in (one, other)]
    return [Turn("user", one[:end], trained=False)], sides[0], sides[1], "completion"


def _answer(turns: Sequence[Turn], column: str) -> Turn:
    """One answer; several turns of the model in a row are one.

    Raises:
        RowError: somebody else speaks in it, or it is empty.
    """
    others = [turn.role for turn in turns if turn.role not in SPOKEN_BY_MODEL]
    if others:
        what = f"the conversations part before the last answer ({column!r} goes on with a {others[0]} turn)"
        raise RowError("different_prompts", what, "Give both answers the same conversation before them.")
    text = "\n\n".join(turn.text for turn in turns)
    if not text.strip():
        raise RowError("empty_answer", f"the answer ({column!r}) is empty", "Fill it in or remove the row.")
    return Turn(turns[0].role if len(turns) == 1 else "assistant", text, trained=True)


def _with_system(prompt: list[Turn], row: Row, columns: Columns) -> list[Turn]:
    system = row.get(columns["system"]) if "system" in columns else None
    if isinstance(system, str) and system.strip() and not (prompt and prompt[0].role == "system"):
        return [Turn("system", system, trained=False), *prompt]
    return prompt


def _untrained(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(Turn(turn.role, turn.text, trained=False) for turn in turns)


def _margin(row: Row, columns: Columns) -> float | None:
    """By how much the chosen answer is better, where a column says it.

    Raises:
        RowError: the rejected answer is the better one.
    """
    if "margin" in columns:
        margin = _number(row.get(columns["margin"]), columns["margin"])
    elif all(field in columns for field in SCORES):
        chosen, rejected = (_number(row.get(columns[field]), columns[field]) for field in SCORES)
        margin = None if chosen is None or rejected is None else chosen - rejected
    else:
        return None
    if margin is not None and margin < 0:
        what = f"the rejected answer has the higher score (margin {margin:g})"
        raise RowError("swapped_pair", what, "Swap the answers, or correct the scores.")
    return margin


def _number(value: Any, column: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("not_a_number", f"the score ({column!r}) is {value!r}", "Write a number.")
    return float(value)


def _no_pairs(format: Format) -> DataError:
    if "mark" in format.columns:
        return DataError(
            f"These rows mark single answers as good or bad: {format.why}.",
            meaning="This task compares two answers to the same prompt.",
            fix="Learn from the marks: --task kto.",
        )
    return DataError(
        f"These rows hold no preferences: {format.why} ({format.name}).",
        meaning="A preference has two answers to one prompt, or one answer with a mark, true or false.",
        fix="Name the columns 'prompt', 'chosen' and 'rejected', or 'prompt', 'completion' and 'label'.",
    )
