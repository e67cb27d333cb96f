"""What a base ends in: an output head that writes text, or a new head that labels rows or tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftlm.data.labels.values import Problem


@dataclass(frozen=True)
class Ending:
    """The end of a base, as a task needs it.

    kind: "text" continues or answers text (causal and encoder-decoder models alike); "rows" gives numbers for
    each row, "tokens" for each token. labels: what those numbers stand for, in order; of a regression or a
    reward one name for its single number. seed: of the weights of a head that the checkpoint does not have.

    >>> Ending("rows", ("negative", "positive")).labels
    ('negative', 'positive')
    """

    kind: Literal["text", "rows", "tokens"]
    labels: tuple[str, ...] = ()
    problem: Problem = "one label"
    seed: int = 0


TEXT = Ending("text")
