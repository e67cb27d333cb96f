"""A prediction of time that the run itself corrects: what was seen of it stands for what is still to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graftlm.planning.estimates import Part, TimeEstimate
from graftlm.planning.step_work import DECODING, OPERATIONS, OPTIMIZER, STREAMED
from graftlm.planning.workload import Workload

SAME_WHATEVER_TOKENS = (OPERATIONS, OPTIMIZER, DECODING, STREAMED)
"""Parts of a step that take as long for few tokens as for many."""
STEPS = "steps"
LIKE_STEPS = ("evaluate", "verify")
"""Parts of a run that are the same kinds of work as its steps: what is slower there is slower here."""


@dataclass(frozen=True)
class SeenStep:
    """One optimizer step that was taken."""

    seconds: float
    tokens: float
    """Real ones; 0 where nobody counted: then it counts as a mean step."""


@dataclass(frozen=True)
class Seen:
    """What was measured of a run."""

    steps: Sequence[SeenStep]
    """Without the first one, which prepares what the others use."""
    finished: Mapping[str, float] = field(default_factory=dict)
    """Seconds of whole parts that are over: `load`."""
    base_measured: float = 0.0
    """Seconds of measuring the base before the run; 0 where it was not."""


def corrected(estimate: TimeEstimate, workload: Workload, seen: Seen) -> TimeEstimate:
    """The estimate as it stands after what was seen. Nothing seen: the same estimate.

    >>> before = TimeEstimate((Part("load", 5.0), Part("steps", 100.0)), step_seconds=1.0)
    >>> workload = Workload(10, 1, 100, 1.0, 10, 10.0, 10, 10.0, 10.0, 1, 100, 0, 0)
    >>> after = corrected(before, workload, Seen([SeenStep(1.5, 0), SeenStep(1.7, 0)], {"load": 7.0}))
    >>> after.step_seconds, after.seconds, after.is_calibrated
    (1.6, 167.0, True)
    """
    if not seen.steps:
        return estimate
    expected = sum(_expected(estimate, workload, step.tokens) for step in seen.steps)
    ratio = sum(step.seconds for step in seen.steps) / expected
    parts = {part.name: part.amount for part in estimate.parts}
    for name in (STEPS, *LIKE_STEPS):
        if name in parts:
            parts[name] *= ratio
    before = estimate.base_seconds
    if seen.base_measured and before and "evaluate" in parts:
        rest = parts["evaluate"] / ratio - before
        parts["evaluate"] = seen.base_measured + rest * seen.base_measured / before
    parts |= {name: seconds for name, seconds in seen.finished.items() if name in parts}
    return replace(
        estimate,
        parts=tuple(Part(name, amount) for name, amount in parts.items()),
        step_seconds=estimate.step_seconds * ratio,
        step_parts=tuple(Part(part.name, part.amount * ratio) for part in estimate.step_parts),
        base_seconds=seen.base_measured or before * ratio,
        is_calibrated=True,
    )


def _expected(estimate: TimeEstimate, workload: Workload, tokens: float) -> float:
    """Predicted seconds of a step of so many tokens."""
    if not tokens or not workload.mean_step_tokens:
        return estimate.step_seconds
    same = sum(part.amount for part in estimate.step_parts if part.name in SAME_WHATEVER_TOKENS)
    return same + (estimate.step_seconds - same) * tokens / workload.mean_step_tokens
