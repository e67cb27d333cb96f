"""A figure early and late in a run."""

from __future__ import annotations

from statistics import fmean

from graftlm.diagnosis.finding import Points


def early(points: Points) -> float:
    """The mean over the first fifth of the points, at least two of them; 0 without any.

    >>> early(((1.0, 2.0), (2.0, 4.0), (3.0, 9.0)))
    3.0
    """
    return fmean(value for _, value in points[: max(2, len(points) // 5)]) if points else 0.0


def late(points: Points) -> float:
    """The mean over the last quarter of the points, at least two of them; 0 without any.

    >>> late(((1.0, 0.0), (2.0, 0.0), (3.0, 4.0), (4.0, 6.0)))
    5.0
    """
    return fmean(value for _, value in points[-max(2, len(points) // 4) :]) if points else 0.0
