"""The fallback for base models, whose tokenizers bring no chat template."""

from __future__ import annotations

from graftlm.data.records import Example
from graftlm.data.segments import Segment
from graftlm.data.tokenizer import Tokenizer, begin_mark

_HEADINGS = {
    "system": "System",
    "user": "User",
    "assistant": "Assistant",
    "tool_call": "Assistant",
    "tool": "Tool",
}


class PlainTemplate:
    r"""Prompt, answer, end token; conversations get a `### User:` line per turn.

    A completion follows its prompt directly when white space parts them already, else on a new line.
    The begin token is written only if the tokenizer writes it before every text. Every answer
    is followed by the tokenizer's end token, which is trained.
    """

    name = "plain"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._begin = begin_mark(tokenizer)
        self.end = str(tokenizer.eos_token) if tokenizer.eos_token is not None else ""

    @property
    def source(self) -> str:
        """The pattern, for people and for comparing."""
        return (
            f"chat: {self._begin}### User:\\n...\\n\\n### Assistant:\\n...{self.end}; "
            f"completion: {self._begin}prompt\\nanswer{self.end}; text: {self._begin}text{self.end}"
        )

    def segments(self, example: Example) -> list[Segment]:
        """The example as text, cut where training starts and stops."""
        begin = [Segment(self._begin, trained=False)] if self._begin else []
        if example.style == "text":
            text = "".join(turn.text for turn in example.turns)
            return [*begin, Segment(text if example.continues else text + self.end, trained=True)]
        return begin + (self._completion(example) if example.style == "completion" else self._chat(example))

    def prompt(self, example: Example) -> str:
        """Everything before the last trained answer, as the model sees it when it has to answer."""
        segments = self.segments(example)
        last = max(index for index, segment in enumerate(segments) if segment.trained)
        return "".join(segment.text for segment in segments[:last])

    def _completion(self, example: Example) -> list[Segment]:
        prompt = "\n".join(turn.text for turn in example.turns[:-1])
        answer = example.turns[-1].text
        parted = prompt[-1:].isspace() or answer[:1].isspace()
        return [
            Segment(prompt if parted else prompt + "\n", trained=False),
            Segment(answer + self.end, trained=True),
        ]

    def _chat(self, example: Example) -> list[Segment]:
        segments: list[Segment] = []
        turns = [(turn.role, turn.text, turn.trained) for turn in example.turns]
        if example.tools:
            turns = with_tools_as_text(turns, example.tools)
        for index, (role, text, trained) in enumerate(turns):
            gap = "\n\n" if index else ""
            segments.append(Segment(f"{gap}### {_HEADINGS[role]}:\n", trained=False))
            end = self.end if role in ("assistant", "tool_call") else ""
            segments.append(Segment(text + end, trained))
        return segments


def with_tools_as_text(turns: list[tuple[str, str, bool]], tools: str) -> list[tuple[str, str, bool]]:
    """Put tool definitions into the system turn, for templates that know no tools."""
    note = f"You can call these tools:\n{tools}"
    if turns and turns[0][0] == "system":
        return [("system", f"{turns[0][1]}\n\n{note}", False), *turns[1:]]
    return [("system", note, False), *turns]
