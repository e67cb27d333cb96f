"""What a trial was found to be worth: a value, and the same value on resampled rows, which is its noise.

All trials are resampled with the same draws, so that the noise of a difference is that of paired rows: much
smaller than that of either value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 1.96
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True)
class Score:
    """Lower is better, whatever is measured: of a figure that should be high this is its negative."""

    value: float
    drawn: tuple[float, ...] = ()
    """On rows drawn with replacement, the same draws for every trial; empty where nothing was resampled."""

    @property
    def error(self) -> float:
        """Half of the 95 % interval of the value itself."""
        return WIDTH * float(np.std(self.drawn)) if self.drawn else 0.0


def noise(one: Score, other: Score) -> float:
    """Half of the 95 % interval of the difference, from paired rows.

    >>> noise(Score(1.0, (1.0, 3.0)), Score(2.0, (2.0, 4.0)))
    0.0
    """
    if not one.drawn or len(one.drawn) != len(other.drawn):
        return 0.0
    return WIDTH * float(np.std(np.subtract(one.drawn, other.drawn)))


def is_better(one: Score, other: Score) -> bool:
    """Whether the difference is larger than its noise."""
    return other.value - one.value > noise(one, other)


def is_equal(one: Score, other: Score) -> bool:
    """Whether rows do not tell the two apart."""
    return not is_better(one, other) and not is_better(other, one)


def best(scores: Sequence[Score]) -> int:
    """The index of the lowest value, the first of equal ones."""
    return min(range(len(scores)), key=lambda index: scores[index].value)
