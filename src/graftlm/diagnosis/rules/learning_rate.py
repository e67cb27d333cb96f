"""D04: a learning rate that is too low to learn anything, or too high to keep it."""

from __future__ import annotations

from statistics import fmean, median

from graftlm.diagnosis.commands import tune_again
from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot, Points
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.run_figures import fell, losses, rates, smooth

TITLE = "Learning rate"
LEAST_STEPS, LIVE_STEPS = 20, 50
"""Steps before anything is said of a run that is over, and of one that goes on."""
LOW, VERY_LOW = 0.25, 0.02
"""Of the usual rate."""
LITTLE, LITTLE_IF_VERY_LOW = 0.10, 0.30
"""The part of its start by which a loss has fallen that is too little: more is asked, the lower the rate."""
HIGH, RISE, CERTAIN_RISE = 3.0, 1.05, 1.3
"""Times the usual rate; and the smoothed loss over its start that says that the model was thrown off."""
WORSE = 1.3
"""The loss at the end over the best it has been."""


def _check(evidence: Evidence) -> Finding | None:
    points, (rate, usual) = losses(evidence), rates(evidence)
    if rate is None or usual is None or usual <= 0 or len(points) < 8:
        return None
    return _too_high(points, rate, usual) or _too_low(evidence, points, rate, usual)


def _too_low(evidence: Evidence, points: Points, rate: float, usual: float) -> Finding | None:
    enough = LEAST_STEPS if evidence.is_over else LIVE_STEPS
    part, share = fell(points), rate / usual
    lowness = min(1.0, max(0.0, (LOW - share) / (LOW - VERY_LOW)))
    little = LITTLE + lowness * (LITTLE_IF_VERY_LOW - LITTLE)
    if len(points) < enough or share > LOW or part >= little:
        return None
    return Finding(
        "D04",
        f"{TITLE} too low",
        "warning",
        round(min(confidence(share, LOW, VERY_LOW), confidence(part, little, 0.0)), 2),
        f"The training loss fell by {100 * part:.1f} % in {len(points)} steps at a learning rate of "
        f"{rate:.1e}; "
        f"Graft takes {usual:.1e} for this method and width.",
        "Adapters start at zero and want about ten times the rate of full fine-tuning; at this one the run "
        "ends "
        "before it has learnt.",
        f"Take {usual:.1e}, or leave train.learning_rate out of the recipe.",
        tune_again("D04", {"train.learning_rate": usual}),
        {"rate": rate, "usual": usual, "fell": part},
        _plot(points),
    )


def _too_high(points: Points, rate: float, usual: float) -> Finding | None:
    if rate < HIGH * usual:
        return None
    curve = smooth(points)
    start = fmean(loss for _, loss in points[:2])
    highest = max(loss for _, loss in curve[2:])
    best, end = min(loss for _, loss in curve), median(loss for _, loss in points[-5:])
    rise, worse = highest / start, end / max(best, 1e-9)
    if rise < RISE and worse < WORSE:
        return None
    if rise >= RISE:
        seen = f"The training loss rose from {start:.3f} to {highest:.3f} after the first steps"
    else:
        seen = f"The training loss was {best:.3f} and is {end:.3f} again"
    return Finding(
        "D04",
        f"{TITLE} too high",
        "error" if end > 0.9 * start else "warning",
        max(confidence(rise, RISE, CERTAIN_RISE), confidence(worse, WORSE, 2 * WORSE)),
        f"{seen} at a learning rate of {rate:.1e}; Graft takes {usual:.1e} for this method and width.",
        "Steps of this size throw the model off before it can learn; what it knew is lost with them.",
        f"Take {usual:.1e}, or leave train.learning_rate out of the recipe.",
        tune_again("D04", {"train.learning_rate": usual}),
        {"rate": rate, "usual": usual, "rise": rise, "worse": worse},
        _plot(points, start),
    )


def _plot(points: Points, start: float | None = None) -> Plot:
    return Plot("Training loss", "step", "nats per token", {"training": points}, start)


RULE = Rule(
    "D04",
    TITLE,
    _check,
    "Ten times full fine-tuning: LoRA Without Regret (2025); each method its own range: arXiv 2602.04998. "
    "What is "
    "usual for a width and the factors around it: our own runs (docs/results/learning-rate.md).",
    is_live=True,
)
