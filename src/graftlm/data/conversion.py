"""One converter per format: a row to drafts of examples, or a `RowError` that says why not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.data.records import SPOKEN_BY_MODEL, Style, Turn

Row = Mapping[str, Any]
Columns = Mapping[str, str]
Note = tuple[str, str, str]  # code, what, fix

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "tool_call",
    "tool_call": "tool_call",
    "observation": "tool",
    "function": "tool",
    "tool": "tool",
    "ipython": "tool",
}
_DIALOGUE = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")


class RowError(ValueError):
    """This one row cannot be used; `code` and `fix` go into its problem."""

    def __init__(self, code: str, what: str, fix: str) -> None:
        super().__init__(what)
        self.code = code
        self.fix = fix


@dataclass(frozen=True)
class Draft:
    """An example without its row number."""

    turns: tuple[Turn, ...]
    style: Style
    tools: str = ""
    continues: bool = False
    notes: tuple[Note, ...] = ()


def text_of(value: Any, column: str, what: str) -> str:
    """The text of a cell; numbers become digits.

    Raises:
        RowError: missing, empty or of a kind that is no text.
    """
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool | int | float):
        text = str(value)
    elif value is None:
        text = ""
    else:
        kind = "a list" if isinstance(value, Sequence) else "an object"
        raise RowError("not_text", f"{what} ({column!r}) is {kind}, not text", "Write it as text.")
    if not text.strip():
        code = "empty_answer" if what == "the answer" else "empty_prompt"
        raise RowError(code, f"{what} ({column!r}) is empty", "Fill it in or remove the row.")
    return text


def _exchange(prompt: str, answer: str, style: Style, before: Sequence[Turn] = ()) -> Draft:
    turns = (*before, Turn("user", prompt, trained=False), Turn("assistant", answer, trained=True))
    return Draft(turns, style)


def _pair(first: str, second: str) -> Callable[[Row, Columns], list[Draft]]:
    """A converter for "from this column, to that one"."""

    def convert(row: Row, columns: Columns) -> list[Draft]:
        answer = row.get(columns[second])
        if isinstance(answer, list) and answer and isinstance(answer[0], str):
            answer = answer[0]  # several references: the first is the one to imitate
        prompt = text_of(row.get(columns[first]), columns[first], "the prompt")
        return [_exchange(prompt, text_of(answer, columns[second], "the answer"), "completion")]

    return convert


def _alpaca(row: Row, columns: Columns) -> list[Draft]:
    instruction = text_of(row.get(columns["instruction"]), columns["instruction"], "the prompt")
    before = _history(row.get(columns.get("history", ""))) if "history" in columns else []
    system = row.get(columns["system"]) if "system" in columns else None
    if isinstance(system, str) and system.strip():
        before.insert(0, Turn("system", system, trained=False))
    if "instances" in columns:
        instances = row.get(columns["instances"])
        if not (isinstance(instances, list) and instances and all(isinstance(x, Mapping) for x in instances)):
            raise RowError("not_a_list", "'instances' is not a list of objects", "Write [{input, output}].")
        cells = [(item.get("input"), item.get("output")) for item in instances]
    else:
        cells = [(row.get(columns["input"]) if "input" in columns else None, row.get(columns["output"]))]
    drafts = []
    for extra, output in cells:
        extra = extra if isinstance(extra, str) and extra.strip() else ""
        prompt = f"{instruction}\n\n{extra}" if extra else instruction
        answer = text_of(output, columns.get("output", "output"), "the answer")
        drafts.append(_exchange(prompt, answer, "chat", before))
    return drafts


def _history(value: Any) -> list[Turn]:
    turns: list[Turn] = []
    for pair in value if isinstance(value, list) else [value] if value else []:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise RowError("history", "'history' is not a list of [question, answer]", "Correct the row.")
        turns += [Turn("user", pair[0], trained=False), Turn("assistant", pair[1], trained=True)]
    return turns


def _text(row: Row, columns: Columns) -> list[Draft]:
    text = text_of(row.get(columns["text"]), columns["text"], "the text")
    return [Draft((Turn("text", text, trained=True),), "text", continues=row.get("continues") is True)]


def _chat(field: str) -> Callable[[Row, Columns], list[Draft]]:
    def convert(row: Row, columns: Columns) -> list[Draft]:
        turns = turns_of(row.get(columns[field]), columns[field])
        system = row.get(columns["system"]) if "system" in columns else None
        if isinstance(system, str) and system.strip() and turns[0].role != "system":
            turns = [Turn("system", system, trained=False), *turns]
        tools = row.get(columns["tools"]) if "tools" in columns else None
        return [finished(turns, tools_text(tools))]

    return convert


def tools_text(value: Any) -> str:
    """Tool definitions as JSON text; data sets hold them as a list or as text of one."""
    if not value:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "" if text.strip() in ("", "[]", "{}") else text


def turns_of(value: Any, column: str) -> list[Turn]:
    """The turns of a conversation written with role/content or from/value.

    Raises:
        RowError: not a list of turns, an unknown role, or content that is no text.
    """
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise RowError("no_turns", f"{column!r} is not a list of turns", "Write [{role, content}, ...].")
    return [turn for position, item in enumerate(value, start=1) for turn in _turns(item, position)]


def _turns(item: Row, position: int) -> list[Turn]:
    said = item.get("role", item.get("from"))
    role = _ROLES.get(str(said).strip().lower())
    if role is None:
        known = "system, user, assistant, tool (or human, gpt, function_call, observation)"
        raise RowError("unknown_role", f"turn {position} has the role {said!r}", f"Known roles are {known}.")
    trained = (
        role in SPOKEN_BY_MODEL and item.get("train") is not False and item.get("weight") not in (0, 0.0)
    )
    content = item.get("content", item.get("value"))
    calls = item.get("tool_calls") or []
    turns = []
    if content is not None or not calls:
        text = _content(content, position)
        if text.strip() or not calls:
            turns.append(Turn(role, text, trained))
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if not isinstance(function, Mapping) or "name" not in function:
            raise RowError("tool_call", f"turn {position} has a tool call without a name", "Correct the row.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise RowError(
                    "tool_call", f"turn {position} has tool arguments that are no JSON", "Correct the row."
                ) from None
        called = {"name": function["name"], "arguments": arguments}
        turns.append(Turn("tool_call", json.dumps(called, ensure_ascii=False), trained))
    return turns


def _content(content: Any, position: int) -> str:
    if isinstance(content, list):
        parts = [
            part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"
        ]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            return "".join(part for part in parts if isinstance(part, str))
        raise RowError(
            "not_text", f"turn {position} holds something other than text", "Remove images and audio."
        )
    if isinstance(content, Mapping):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise RowError("not_text", f"turn {position} has no text", "Give every turn its content.")
    return content


def finished(turns: Sequence[Turn], tools: str = "") -> Draft:
    """A conversation ready to train on: it has an answer, and it ends with one.

    Raises:
        RowError: nothing in it is to be learnt, or the last answer is empty.
    """
    last = max((index for index, turn in enumerate(turns) if turn.role in SPOKEN_BY_MODEL), default=-1)
    if last < 0:
        raise RowError("no_answer", "the conversation has no assistant turn", "Add one or remove the row.")
    kept = tuple(turns[: last + 1])
    if not any(turn.trained for turn in kept):
        raise RowError("no_answer", "every assistant turn is marked as not trained", "Remove the row.")
    if any(turn.trained and not turn.text.strip() for turn in kept):
        raise RowError("empty_answer", "an assistant turn is empty", "Fill it in or remove the row.")
    notes: tuple[Note, ...] = ()
    if len(kept) < len(turns):
        what = f"the last {len(turns) - len(kept)} turn(s) have no answer and are left out"
        notes = (("unanswered_turn", what, "Nothing to do, or add the answer."),)
    return Draft(kept, "chat", tools, notes=notes)


def _preference(row: Row, columns: Columns) -> list[Draft]:
    """The better answer only (the user asked for that by naming the format)."""
    if "mark" in columns:
        if row.get(columns["mark"]) is not True:
            raise RowError("bad_answer", "the answer is marked as bad", "Nothing to do: it is not imitated.")
        if "completion" in columns:
            asked = text_of(row.get(columns["prompt"]), columns["prompt"], "the prompt")
            said = text_of(row.get(columns["completion"]), columns["completion"], "the answer")
            return [_exchange(asked, said, "completion")]
        return [finished(turns_of(row.get(columns["messages"]), columns["messages"]))]
    chosen = row.get(columns["chosen"])
    prompt = row.get(columns["prompt"]) if "prompt" in columns else None
    if isinstance(prompt, list):
        before = turns_of(prompt, columns["prompt"])
    elif isinstance(prompt, str) and prompt.strip():
        before = [Turn("user", prompt, trained=False)]
    else:
        before = []
    if isinstance(chosen, Mapping):
        chosen = [chosen]
    if isinstance(chosen, list):
        answer = turns_of(chosen, columns["chosen"])
        turns = answer if len(answer) > 1 else [*before, *answer]
    else:
        text = text_of(chosen, columns["chosen"], "the answer")
        turns = dialogue(text) if not before else [*before, Turn("assistant", text, trained=True)]
    # Only the answer that was judged is imitated, not the earlier ones of the conversation.
    return [finished([*(Turn(turn.role, turn.text, False) for turn in turns[:-1]), *turns[-1:]])]


def dialogue(text: str) -> list[Turn]:
    r"""Split a text of `\n\nHuman: ... \n\nAssistant: ...` (HH-RLHF) into turns.

    >>> [turn.role for turn in dialogue("\n\nHuman: Hi\n\nAssistant: Hello.")]
    ['user', 'assistant']
    """
    parts = _DIALOGUE.split(text)
    turns = [
        Turn("user" if who == "Human" else "assistant", said.strip(), trained=who == "Assistant")
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if parts[0].strip() or not turns:
        raise RowError("no_prompt", "'chosen' is text without a prompt", "Add a 'prompt' column.")
    return turns


#: Format -> its converter.
CONVERTERS: dict[str, Callable[[Row, Columns], list[Draft]]] = {
    "messages": _chat("messages"),
    "sharegpt": _chat("conversations"),
    "alpaca": _alpaca,
    "prompt_completion": _pair("prompt", "completion"),
    "question_answer": _pair("question", "answer"),
    "text_label": _pair("text", "label"),
    "source_target": _pair("source", "target"),
    "preference": _preference,
    "text": _text,
}
