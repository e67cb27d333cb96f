"""Rewards against marks: whether good answers get more of it than bad ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graftlm.evaluation.runner import EvaluatedRow

MARKS = ("reward", "is_good")
"""The figures of a row that these read."""


def good_above_bad(rows: Sequence[EvaluatedRow]) -> float:
    """Share of all pairs of a good and a bad answer in which the good one has the higher reward.

    Equal rewards count half: the area under the ROC curve. NaN where all marks are the same.

    >>> rows = [EvaluatedRow(n, "", 0.0, 1, figures={"reward": n, "is_good": n > 1}) for n in (0, 1, 2, 3)]
    >>> good_above_bad(rows)
    1.0
    """
    rewards, good = _arrays(rows)
    high, low = int(good.sum()), int((~good).sum())
    if not high or not low:
        return math.nan
    _, place, counts = np.unique(rewards, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    ranks = (ends - (counts - 1) / 2)[place]  # equal values share their mean rank
    return float((ranks[good].sum() - high * (high + 1) / 2) / (high * low))


def mark_margin(rows: Sequence[EvaluatedRow]) -> float:
    """Mean reward of good answers minus that of bad ones; NaN where all marks are the same."""
    rewards, good = _arrays(rows)
    if good.all() or not good.any():
        return math.nan
    return float(rewards[good].mean() - rewards[~good].mean())


def _arrays(rows: Sequence[EvaluatedRow]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    values = [(row.figures["reward"], row.figures["is_good"] > 0) for row in rows]
    return np.array([reward for reward, _ in values]), np.array([is_good for _, is_good in values])
