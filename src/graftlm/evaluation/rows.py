"""What an evaluation reads: rows of token ids with labels, and how a row is told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

IGNORED = -100
"""Label of a token that is not a target, as everywhere in the field."""


class TokenRow(Protocol):
    """An encoded example; `graftlm.data.encode.Encoded` is one.

    Labels are not shifted: `labels[t]` is `input_ids[t]` where token t is a target, else -100. `row` is the
    number of the row in its file.
    """

    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def row(self) -> int: ...


@dataclass(frozen=True)
class Tokens:
    """A row made here rather than read from a data file."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    row: int


def target_count(row: TokenRow) -> int:
    """Targets that a causal model can be asked for: the first token has nothing before it.

    >>> target_count(Tokens((5, 6, 7), (5, -100, 7), row=1))
    1
    """
    return sum(label != IGNORED for label in row.labels[1:])


def digest(row: TokenRow) -> str:
    """SHA-256 (16 hex digits) of ids and labels: equal only for the same question asked of the model."""
    content = f"{list(row.input_ids)}|{list(row.labels)}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def prompt_and_reference(row: TokenRow) -> tuple[list[int], list[int]] | None:
    """The ids before the first target and the first run of targets; None where nothing precedes the targets.

    Running text has no prompt: its targets begin at the first or second token (after a begin token).

    >>> prompt_and_reference(Tokens((1, 5, 6, 7, 8), (-100, -100, 6, 7, -100), row=1))
    ([1, 5], [6, 7])
    """
    first = next((place for place, label in enumerate(row.labels) if label != IGNORED), None)
    if first is None or first < 2:
        return None
    end = first
    while end < len(row.labels) and row.labels[end] != IGNORED:
        end += 1
    return list(row.input_ids[:first]), list(row.input_ids[first:end])
