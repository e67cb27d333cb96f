"""Figures of a run that several rules read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Points

SPIKE_WINDOW, SPIKE_MOST, SPIKE_LEAST = 128, 6.0, 16
"""Steps looked back on, robust deviations that make a spike, steps needed to tell (OLMo-core, Levanter)."""
POLICIES = ("grpo", "rloo", "ppo")
"""Tasks whose loss says nothing of how well they do."""
LEAP = 1.05
"""A spike is at least so much higher than the three steps before it."""


def losses(evidence: Evidence) -> Points:
    """Training loss by step, where it is finite; none of learning from rewards, where it lies around zero."""
    if evidence.task in POLICIES:
        return ()
    return tuple(point for point in evidence.series("step", "loss") if math.isfinite(point[1]))


def held_out(evidence: Evidence) -> Points:
    """Held-out loss by step, where it is finite."""
    return tuple(point for point in evidence.series("evaluate", "loss") if math.isfinite(point[1]))


def rates(evidence: Evidence) -> tuple[float | None, float | None]:
    """(learning rate of the run, the one that Graft would take): None where nobody knows."""
    own = setting(evidence, "train", "learning_rate")
    usual = evidence.plan.get("usual_learning_rate")
    return _number(own), _number(usual)


def setting(evidence: Evidence, section: str, name: str) -> Any:
    """A value of the recipe."""
    found = evidence.recipe.get(section)
    return found.get(name) if isinstance(found, Mapping) else None


def fell(points: Points) -> float:
    """By what part of its start a loss fell: means over a tenth of the points at both ends.

    >>> fell(((1.0, 4.0), (2.0, 3.0), (3.0, 2.0)))
    0.5
    """
    if len(points) < 2:
        return 0.0
    some = max(1, len(points) // 10)
    start = fmean(value for _, value in points[:some])
    return (start - fmean(value for _, value in points[-some:])) / start if start > 0 else 0.0


def smooth(points: Points, width: int = 5) -> Points:
    """Medians over `width` neighbours: one bad batch leaves no trace."""
    reach = width // 2
    values = [value for _, value in points]
    return tuple(
        (step, median(values[max(0, place - reach) : place + reach + 1]))
        for place, (step, _) in enumerate(points)
    )


def spikes(points: Points) -> list[tuple[float, float]]:
    """(step, robust deviations above the steps before it) of every spike of a loss."""
    found = []
    for place in range(SPIKE_LEAST, len(points)):
        if points[place][1] <= LEAP * max(value for _, value in points[place - 3 : place]):
            continue  # most steps: the window need not be looked at
        before = [value for _, value in points[max(0, place - SPIKE_WINDOW) : place]]
        step, value = points[place]
        deviations = _above(value, before)
        if deviations > SPIKE_MOST:
            found.append((step, deviations))
    return found


def _above(value: float, before: Sequence[float]) -> float:
    """Robust z: a falling loss makes the deviation wide, so that only what leaves it upwards counts."""
    middle = median(before)
    spread = 1.4826 * median(abs(one - middle) for one in before)
    return (value - middle) / max(spread, 0.02 * abs(middle), 1e-9)


def end_of(evidence: Evidence) -> Mapping[str, Any]:
    """The event that ended the run, or nothing."""
    ends = [event for event in evidence.events if event.get("kind") == "end"]
    return ends[-1] if ends else {}


def last_step(evidence: Evidence) -> int:
    """Steps that were taken."""
    return max((int(event["step"]) for event in evidence.events if event.get("kind") == "step"), default=0)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
