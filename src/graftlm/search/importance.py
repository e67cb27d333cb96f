"""How much of the differences between trials one parameter explains alone, and whether that is chance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
PERMUTATIONS = 500
LEAST = 6
"""Trials below which nothing can be said."""
_CHANCE = 0.05


@dataclass(frozen=True)
class Importance:
    """Of one parameter. `share`: of the variance of the ranks of trials, predicted for each trial from the
    others by this parameter alone; 0 where it predicts nothing. `p_value`: how often chance does as well."""

    name: str
    share: float
    p_value: float
    trials: int

    @property
    def is_clear(self) -> bool:
        """Whether it is more than chance."""
        return self.p_value < _CHANCE


def importances(points: Sequence[Mapping[str, Any]], values: Sequence[float]) -> list[Importance]:
    """Of every parameter, the most important first; empty with fewer than `LEAST` trials.

    Ranks are explained, so that one diverged trial does not decide. Prediction leaves the trial itself out:
    numbers by a kernel over their ranks, names by the mean of the other trials with the same name.
    """
    found = []
    for name in dict.fromkeys(key for point in points for key in point):
        rows = [index for index, point in enumerate(points) if name in point]
        column = [points[index][name] for index in rows]
        if len(rows) < LEAST or len({json.dumps(value) for value in column}) < 2:
            continue
        weights = _weights(column)
        target = _ranks(np.array([values[index] for index in rows], float))
        share = _explained(weights, target)
        generator = np.random.default_rng(0)
        chance = [_explained(weights, generator.permutation(target)) for _ in range(PERMUTATIONS)]
        p_value = (1 + sum(other >= share for other in chance)) / (PERMUTATIONS + 1)
        found.append(Importance(name, max(0.0, share), p_value, len(rows)))
    return sorted(found, key=lambda one: -one.share)


def _weights(column: Sequence[Any]) -> Floats:
    """[trials, trials]: how much each other trial counts in the prediction of one; rows sum to 1."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        ranks = _ranks(np.array(column, float)) / len(column)
        weights = np.exp(-(((ranks[:, None] - ranks[None, :]) / 0.15) ** 2) / 2)
    else:
        names = np.array([json.dumps(value) for value in column])
        weights = (names[:, None] == names[None, :]).astype(float)
    np.fill_diagonal(weights, 0.0)
    weights += 1e-6  # who has no neighbour is predicted by all
    np.fill_diagonal(weights, 0.0)
    total: Floats = weights / weights.sum(axis=1, keepdims=True)
    return total


def _explained(weights: Floats, target: Floats) -> float:
    """1 - squared error of the prediction over that of the mean of the others."""
    count = len(target)
    others = (target.sum() - target) / (count - 1)
    error = float(((target - weights @ target) ** 2).sum())
    return 1 - error / max(float(((target - others) ** 2).sum()), 1e-12)


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: Floats = (ends - (counts + 1) / 2).astype(float)
    return middle[place]
