"""What a model reads of a row and what it learns from it, whatever kind of row a task made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.data.branches import Branched
from graftlm.data.encode import IGNORED, Encoded
from graftlm.data.pairs import Pair
from graftlm.data.preferences.encode import MarkedRow


@dataclass(frozen=True, slots=True)
class View:
    """One sequence of tokens.

    labels: as long as `ids`, unshifted; -100 where nothing is learnt. is_cut: something was left out.
    begins: whether the sequence is read from its beginning on (what a decoder writes is not).
    """

    ids: Sequence[int]
    labels: Sequence[int]
    row: int
    is_cut: bool
    begins: bool = True

    @property
    def last_trained(self) -> int:
        """The place of the last token that is learnt; -1 where nothing is."""
        places = range(len(self.labels) - 1, -1, -1)
        return next((place for place in places if self.labels[place] != IGNORED), -1)


def views(rows: Iterable[Any]) -> list[View]:
    """The sequences of all rows that learn to write; of other rows there are none."""
    return [view for row in rows for view in _of(row)]


def _of(row: Any) -> Iterator[View]:
    if isinstance(row, Encoded):
        yield View(row.input_ids, row.labels, row.row, row.truncated)
    elif isinstance(row, Pair):
        yield View(row.target, row.target, row.row, row.truncated, begins=False)
    elif isinstance(row, MarkedRow):
        yield from _answers(row.branched, 1)
    elif isinstance(row, Branched):
        yield from _answers(row, len(row.answers))


def _answers(row: Branched, count: int) -> Iterator[View]:
    for answer in row.answers[:count]:
        labels = (*(IGNORED for _ in row.prompt), *answer)
        yield View((*row.prompt, *answer), labels, row.row, row.truncated)


def whole_texts(found: Sequence[View]) -> tuple[list[View], list[View]]:
    """The first and the last windows of texts, which hold their beginning and their end; any other row is
    both.

    >>> one, two = View((1, 2), (1, 2), 1, False), View((2, 3), (2, 3), 1, False)
    >>> whole_texts([one, two]) == ([one], [two])
    True
    """
    firsts: list[View] = []
    lasts: list[View] = []
    for view in found:
        is_window = bool(lasts) and lasts[-1].row == view.row and lasts[-1].ids[-1:] == view.ids[:1]
        if not is_window:
            firsts.append(view)
        lasts[-1 if is_window else len(lasts) :] = [view]
    return firsts, lasts
