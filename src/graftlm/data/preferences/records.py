"""Judged answers: a prompt with a better and a worse answer, or with answers marked good or bad."""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.data.records import Example, Style, Turn


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two answers, of which one was preferred.

    prompt: all turns before the answers, none of them trained. margin: by how much the chosen answer is
    better, where the data say so. row: 1-based number in `source`.
    """

    prompt: tuple[Turn, ...]
    chosen: Turn
    rejected: Turn
    row: int
    source: str = ""
    style: Style = "chat"
    tools: str = ""
    margin: float | None = None

    @property
    def key(self) -> str:
        """The content without letter case and spacing: equal keys mean "the same row"."""
        return _key((*self.prompt, self.chosen, self.rejected), self.tools)

    @property
    def text(self) -> str:
        """The text of the prompt and of both answers."""
        return "\n".join(turn.text for turn in (*self.prompt, self.chosen, self.rejected))

    @property
    def examples(self) -> tuple[Example, Example]:
        """The chosen and the rejected answer, each as an example of its own with the prompt before it."""
        return self._with(self.chosen), self._with(self.rejected)

    def _with(self, answer: Turn) -> Example:
        return answered(self.prompt, answer, self.row, self.source, self.style, self.tools)


@dataclass(frozen=True, slots=True)
class Marked:
    """A prompt and answers to it, each with a mark: good (True) or bad.

    answers: one, as a rule; a preference pair has two, the chosen one marked good.
    """

    prompt: tuple[Turn, ...]
    answers: tuple[tuple[Turn, bool], ...]
    row: int
    source: str = ""
    style: Style = "chat"
    tools: str = ""

    @classmethod
    def of_pair(cls, pair: Preference) -> Marked:
        """Both answers of a pair."""
        answers = ((pair.chosen, True), (pair.rejected, False))
        return cls(pair.prompt, answers, pair.row, pair.source, pair.style, pair.tools)

    @property
    def key(self) -> str:
        """The content without letter case and spacing: equal keys mean "the same row"."""
        marks = "".join("+" if is_good else "-" for _, is_good in self.answers)
        return _key((*self.prompt, *(answer for answer, _ in self.answers)), self.tools + marks)

    @property
    def text(self) -> str:
        """The text of the prompt and of all answers."""
        return "\n".join(turn.text for turn in (*self.prompt, *(answer for answer, _ in self.answers)))

    @property
    def examples(self) -> tuple[Example, ...]:
        """Each answer as an example of its own with the prompt before it."""
        return tuple(
            answered(self.prompt, answer, self.row, self.source, self.style, self.tools)
            for answer, _ in self.answers
        )


def answered(
    prompt: tuple[Turn, ...], answer: Turn, row: int, source: str, style: Style, tools: str
) -> Example:
    """A prompt with one answer, which is all that is learnt.

    >>> example = answered((Turn("user", "Hi", False),), Turn("assistant", "Yes?", True), 1, "", "chat", "")
    >>> example.answer
    'Yes?'
    """
    return Example((*prompt, Turn(answer.role, answer.text, trained=True)), row, source, style, tools)


def _key(turns: tuple[Turn, ...], rest: str) -> str:
    parts = [f"{turn.role}\x1f{' '.join(turn.text.casefold().split())}" for turn in turns]
    return "\x1e".join([*parts, rest])
