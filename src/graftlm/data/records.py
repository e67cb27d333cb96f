"""The records every part of the data layer speaks: a turn, an example, a problem, a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Style = Literal["chat", "completion", "text"]
Severity = Literal["error", "warning"]

#: Roles a turn can have. `tool_call` is an assistant's call of a tool, `tool` the tool's answer.
ROLES = ("system", "user", "assistant", "tool_call", "tool")

#: Roles whose words the model itself must produce.
SPOKEN_BY_MODEL = frozenset({"assistant", "tool_call"})


@dataclass(frozen=True, slots=True)
class Turn:
    """One message.

    role: one of `ROLES`. trained: whether the model learns to write it.
    """

    role: str
    text: str
    trained: bool


class Record(Protocol):
    """What every kind of example has, so that it can be split, compared and named in messages."""

    @property
    def row(self) -> int:
        """Its 1-based number in the file."""

    @property
    def key(self) -> str:
        """Its content without letter case and spacing: equal keys mean "the same row"."""

    @property
    def text(self) -> str:
        """All of its text, in which near duplicates are found."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training example, whatever the file looked like.

    row: 1-based line (text, JSON Lines, CSV) or item number (JSON, Parquet, hub) in `source`.
    style: `chat` (a conversation), `completion` (a prompt and its answer), `text` (one document).
    tools: JSON text of the tool definitions, or "".
    continues: a piece of plain text whose document goes on in the next row; it gets no end token.
    """

    turns: tuple[Turn, ...]
    row: int
    source: str = ""
    style: Style = "chat"
    tools: str = ""
    continues: bool = False

    @property
    def key(self) -> str:
        r"""The content without letter case and spacing: equal keys mean "the same row".

        >>> one = Example((Turn("user", "Hi  there", False), Turn("assistant", "Yes.", True)), row=1)
        >>> two = Example((Turn("user", "hi there\n", False), Turn("assistant", "yes.", True)), row=9)
        >>> one.key == two.key
        True
        """
        parts = [f"{turn.role}\x1f{' '.join(turn.text.casefold().split())}" for turn in self.turns]
        return "\x1e".join([*parts, self.tools])

    @property
    def text(self) -> str:
        """The text of all turns."""
        return "\n".join(turn.text for turn in self.turns)

    @property
    def answer(self) -> str:
        """The last text the model has to write ("" when there is none)."""
        return next((turn.text for turn in reversed(self.turns) if turn.trained), "")


@dataclass(frozen=True, slots=True)
class Problem:
    """A finding about one row, or about the whole file (`row` is None).

    severity: an `error` means that the row is left out, a `warning` that it is used.
    code: a short stable name, for counting. what: what was seen. fix: what to do about it.
    """

    row: int | None
    severity: Severity
    code: str
    what: str
    fix: str

    def __str__(self) -> str:
        where = "" if self.row is None else f"row {self.row}: "
        end = "" if self.what.endswith("?") else "."
        return f"{where}{self.what}{end} {self.fix}".rstrip()


@dataclass(frozen=True)
class Format:
    """The shape of a file's rows.

    columns: field of the format -> name of the column. why: one sentence for the user.
    origin: `detected` from the keys or named by the `user`. problems: doubts about the choice.
    """

    name: str
    columns: dict[str, str]
    why: str
    origin: Literal["detected", "user"] = "detected"
    problems: tuple[Problem, ...] = ()
