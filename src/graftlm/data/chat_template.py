"""A tokenizer's own chat template, and the proof of where each answer lies in what it renders."""

from __future__ import annotations

import json
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.plain_template import with_tools_as_text
from graftlm.data.records import Example
from graftlm.data.segments import Segment, Span, from_spans
from graftlm.data.tokenizer import Tokenizer, begin_mark, end_marks

Message = dict[str, Any]

#: Stands for a text while probing; plain letters, so that no template rewrites it.
_PROBE = "Gqzx{}Gqzx"


class ChatTemplate:
    """Renders conversations as the tokenizer's authors do, and finds the trained parts.

    What is trained is what the model must write when it is given the rendered prompt: from the end of
    the generation prompt to the end-of-turn token, inclusive. A template without a generation
    prompt makes the model write the header of its turn too, so the header is then trained.

    Two proofs, tried in this order, per answer:

    1. *prefix*: the conversation before the answer, rendered as a prompt, is a prefix of the whole
       rendering; so is the conversation up to and including it (or the next end-of-turn token).
    2. *substitution*: with a marker in place of the answer everything else stays the same.

    Where neither holds the row is refused with the reason.
    """

    name = "chat"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._marks = end_marks(tokenizer)
        self._begin = begin_mark(tokenizer)
        self._eos = str(tokenizer.eos_token) if tokenizer.eos_token is not None else ""
        template = tokenizer.chat_template
        self.source = template if isinstance(template, str) else json.dumps(template)
        user, answer = _message("user", _PROBE.format("U")), _message("assistant", _PROBE.format("A"))
        self._takes_system = self._shows([_message("system", _PROBE.format("S")), user], _PROBE.format("S"))
        self._takes_tool = self._shows(
            [user, answer, _message("tool", _PROBE.format("T"))], _PROBE.format("T")
        )
        call = _call_message({"name": _PROBE.format("C"), "arguments": {}})
        self._takes_calls = self._shows([user, call], _PROBE.format("C"))
        tool = {"type": "function", "function": {"name": _PROBE.format("F"), "parameters": {}}}
        self._takes_tools = self._shows([user], _PROBE.format("F"), tools=[tool])
        rendered = self._try([user, answer]) or ""
        self._tail = self._closed(rendered.partition(_PROBE.format("A"))[2])
        mark = self._first_mark(self._tail)
        self._end_mark = mark
        #: The end-of-turn token; the tokenizer's end token where the template writes none.
        self.end = mark or self._eos

    def segments(self, example: Example) -> list[Segment]:
        """The rendered conversation, cut where training starts and stops.

        Raises:
            DataError: the template refuses the conversation, or hides where the answer is.
        """
        if example.style == "text":
            text = "".join(turn.text for turn in example.turns)
            begin = [Segment(self._begin, trained=False)] if self._begin else []
            return [*begin, Segment(text if example.continues else text + self._eos, trained=True)]
        messages, trained, tools = self._messages(example)
        full = self._render(messages, tools, example.row)
        if not self._end_mark:
            full += self._eos  # or nothing in the conversation would teach the model to stop
        spans = [self._span(messages, index, full, tools, example.row) for index in trained]
        return from_spans(full, spans)

    def prompt(self, example: Example) -> str:
        """The rendering up to the last trained answer, with the generation prompt."""
        messages, trained, tools = self._messages(example)
        return self._render(messages[: trained[-1]], tools, example.row, answer_follows=True)

    def _span(
        self, messages: list[Message], index: int, full: str, tools: list[Any] | None, row: int
    ) -> Span:
        before = self._try(messages[:index], tools, answer_follows=True) if index else None
        span = None
        if before is not None and full.startswith(before):
            span = self._span_after(len(before), messages, index, full, tools)
        if span is None:
            span = self._span_by_substitution(messages, index, full, tools)
        if span is None or not self._says_something(full[slice(*span)]):
            raise DataError(
                f"row {row}: the chat template rewrites turn {index + 1}; its answer cannot be found again.",
                meaning="What the model sees before an answer is not the beginning of the whole text.",
                fix="Correct the tokenizer's chat template, or end each conversation at its first answer.",
            )
        return span

    def _span_after(
        self, start: int, messages: list[Message], index: int, full: str, tools: list[Any] | None
    ) -> Span | None:
        if index == len(messages) - 1:
            return start, start + len(self._closed(full[start:]))
        after = self._try(messages[: index + 1], tools)
        if after is not None and full.startswith(after) and len(after) > start:
            return start, start + len(self._closed(full[start : len(after)]))
        end = full.find(self._end_mark, start) if self._end_mark else -1
        return (start, end + len(self._end_mark)) if end >= 0 else None

    def _span_by_substitution(
        self, messages: list[Message], index: int, full: str, tools: list[Any] | None
    ) -> Span | None:
        content = messages[index]["content"]
        marker = _PROBE.format(f"X{len(full)}")
        if not content or marker in full:
            return None
        probe = self._try(
            [*messages[:index], {**messages[index], "content": marker}, *messages[index + 1 :]], tools
        )
        head, found, tail = (probe or "").partition(marker)
        if not self._end_mark:
            tail += self._eos
        if not found or not full.startswith(head) or not full.endswith(tail):
            return None
        stop = len(full) - len(tail)
        if full[len(head) : stop].strip() != content.strip():
            return None
        if self._tail and tail.startswith(self._tail):
            return len(head), stop + len(self._tail)
        if tail.lstrip().startswith(self._end_mark):
            return len(head), stop + tail.index(self._end_mark) + len(self._end_mark)
        return len(head), stop

    def _closed(self, text: str) -> str:
        """Without the line breaks that a template writes after an end-of-turn token."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(tuple(self._marks)) else text

    def _first_mark(self, text: str) -> str:
        found = [(text.index(mark), -len(mark), mark) for mark in self._marks if mark in text]
        return min(found)[2] if found else ""

    def _says_something(self, text: str) -> bool:
        for mark in self._marks:
            text = text.replace(mark, "")
        return bool(text.strip())

    def _messages(self, example: Example) -> tuple[list[Message], list[int], list[Any] | None]:
        """Messages the template understands, the indices of the trained ones, and the tools."""
        turns = [(turn.role, turn.text, turn.trained) for turn in example.turns]
        tools = _tool_list(example.tools) if self._takes_tools else None
        if example.tools and tools is None:
            turns = with_tools_as_text(turns, example.tools)
        if turns[0][0] == "system" and not self._takes_system and len(turns) > 1:
            role, text, trained = turns[1]
            turns = [(role, f"{turns[0][1]}\n\n{text}", trained), *turns[2:]]
        messages = [self._message(role, text) for role, text, _ in turns]
        return messages, [index for index, turn in enumerate(turns) if turn[2]], tools

    def _message(self, role: str, text: str) -> Message:
        if role == "tool_call":
            call = _loads(text)
            if self._takes_calls and isinstance(call, dict) and "name" in call:
                return _call_message(call)
            return _message("assistant", text)
        if role == "tool" and not self._takes_tool:
            return _message("user", f"Tool result:\n{text}")
        return _message(role, text)

    def _shows(self, messages: list[Message], text: str, tools: list[Any] | None = None) -> bool:
        return text in (self._try(messages, tools) or "")

    def _render(
        self, messages: list[Message], tools: list[Any] | None, row: int, *, answer_follows: bool = False
    ) -> str:
        from jinja2 import TemplateError

        try:
            return self._apply(messages, tools, answer_follows)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"row {row}: the chat template refuses the conversation: {error}",
                meaning="Many templates want user and assistant in turn, starting with the user.",
                fix="Correct the order of the turns in this row.",
            ) from None

    def _try(
        self, messages: list[Message], tools: list[Any] | None = None, *, answer_follows: bool = False
    ) -> str | None:
        from jinja2 import TemplateError

        try:
            return self._apply(messages, tools, answer_follows)
        except (TemplateError, TypeError, ValueError):
            return None

    def _apply(self, messages: list[Message], tools: list[Any] | None, answer_follows: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=answer_follows
            )
        )


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _call_message(call: dict[str, Any]) -> Message:
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _tool_list(text: str) -> list[Any] | None:
    tools = _loads(text) if text else None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        return None
    # Data sets often hold the bare function; templates expect the wrapper of the OpenAI API.
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
