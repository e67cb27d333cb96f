"""Straight lines through measured points, and how far the points are from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """y = start + slope x; `deviation` is the largest relative distance of a point from it."""

    start: float
    slope: float
    deviation: float

    def at(self, x: float) -> float:
        return self.start + self.slope * x


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Least squares of the relative distances, so that small values count as much as large ones.

    >>> line = fit([(1.0, 3.0), (2.0, 5.0), (4.0, 9.0)])
    >>> round(line.start, 6), round(line.slope, 6), round(line.deviation, 6)
    (1.0, 2.0, 0.0)
    """
    weights = [1.0 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    across = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    along = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = across / along if along else 0.0
    line = Line(mean_y - slope * mean_x, slope, 0.0)
    return Line(line.start, slope, max(abs(line.at(x) / y - 1) for x, y in points))
