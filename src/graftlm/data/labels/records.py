"""Labelled rows: texts with what is to be told of them, and words with a tag each."""

from __future__ import annotations

from dataclasses import dataclass

JOINED = " | "
"""Between the labels of one row, where they are shown as one text."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or two that belong together, and its labels.

    labels: one name, or any number of them. number: what is told instead, where that is a number.
    row: 1-based number in `source`.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    row: int
    source: str = ""
    number: float | None = None

    @property
    def key(self) -> str:
        """The texts without letter case and spacing. The label is no part of it: a text that comes twice,
        with two labels, must not be trained on and held out.

        >>> Labelled(("So  good",), ("yes",), 1).key == Labelled(("so good ",), ("no",), 2).key
        True
        """
        return "\x1e".join(" ".join(text.casefold().split()) for text in self.texts)

    @property
    def text(self) -> str:
        """All of its text."""
        return "\n".join(self.texts)

    @property
    def answer(self) -> str:
        """What is to be told, as text."""
        return JOINED.join(self.labels) if self.number is None else f"{self.number:g}"


@dataclass(frozen=True, slots=True)
class Tagged:
    """A sentence cut into words, and the tag of each word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    row: int
    source: str = ""

    @property
    def key(self) -> str:
        """The words without letter case: equal keys mean "the same row"."""
        return "\x1e".join(word.casefold() for word in self.words)

    @property
    def text(self) -> str:
        """The words."""
        return " ".join(self.words)
