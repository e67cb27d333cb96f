"""How sure a rule is, by how far a figure lies beyond its threshold."""

from __future__ import annotations

import math

AT_THRESHOLD, MOST = 0.5, 0.99


def confidence(value: float, threshold: float, certain: float) -> float:
    """0.5 at `threshold`, rising to 0.99 at `certain` and beyond; either may be the larger.

    >>> confidence(0.5, 0.5, 1.0), confidence(0.75, 0.5, 1.0), confidence(2.0, 0.5, 1.0)
    (0.5, 0.74, 0.99)
    """
    if certain == threshold or not math.isfinite(value):
        return MOST
    share = min(1.0, max(0.0, (value - threshold) / (certain - threshold)))
    return round(AT_THRESHOLD + (MOST - AT_THRESHOLD) * share, 2)
