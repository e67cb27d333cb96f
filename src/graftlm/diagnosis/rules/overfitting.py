"""D02: the adapter learns its rows by heart, and loses what holds for others."""

from __future__ import annotations

import math
from statistics import fmean

from graftlm.diagnosis.commands import tune_again
from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot, Points
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.run_figures import held_out, last_step, losses, setting

TITLE = "Overfitting"
FEW_ROWS = 500
RISE, CERTAIN_RISE = 1.03, 1.15
"""Held-out loss over its best, at the last two measurements."""
GAP, LEARNT_BY_HEART = 0.5, 0.2
"""Nats between held-out and training loss, and the training loss below which rows are known by heart: what is
asked where the held-out loss was measured only once or twice."""
MEASUREMENTS = 10
"""Of the held-out loss in the run that the fix starts."""


def _check(evidence: Evidence) -> Finding | None:
    measured, trained = held_out(evidence), losses(evidence)
    if setting(evidence, "train", "early_stopping_patience") or not measured or not trained:
        return None  # with patience the run itself keeps its best step
    return _rising(evidence, measured, trained) or _apart(evidence, measured, trained)


def _rising(evidence: Evidence, measured: Points, trained: Points) -> Finding | None:
    best_step, best = min(measured, key=lambda point: point[1])
    after = [loss for step, loss in measured if step > best_step]
    if len(after) < 2 or min(after[-2:]) <= RISE * best:
        return None
    rise = after[-1] / best
    epoch = _epoch(evidence, best_step)
    seen = (
        f"The held-out loss was best at step {best_step:.0f} ({best:.3f}) and is {after[-1]:.3f} now, "
        f"{100 * (rise - 1):.0f} % higher, while the training loss fell on to {_end(trained):.3f}."
    )
    figures = {"best": best, "best_step": best_step, "last": after[-1], "rise": rise, "best_epoch": epoch}
    return _finding(evidence, seen, confidence(rise, RISE, CERTAIN_RISE), figures, (measured, trained))


def _apart(evidence: Evidence, measured: Points, trained: Points) -> Finding | None:
    last, end = measured[-1][1], _end(trained)
    gap = last - end
    improves = len(measured) > 2 and last <= min(loss for _, loss in measured)
    if not evidence.is_over or improves or gap <= GAP or end >= LEARNT_BY_HEART:
        return None
    seen = f"The training loss ends at {end:.3f}, the held-out loss at {last:.3f}: {gap:.2f} nats apart."
    figures = {"training": end, "held_out": last, "gap": gap}
    return _finding(evidence, seen, confidence(gap, GAP, 3 * GAP), figures, (measured, trained))


def _finding(
    evidence: Evidence, seen: str, sure: float, figures: dict[str, float], curves: tuple[Points, Points]
) -> Finding:
    rows = int(evidence.plan.get("train_rows", 0))
    few = f" {rows:,} training rows are few: they are seen again and again." if 0 < rows < FEW_ROWS else ""
    changes: dict[str, object] = {"train.early_stopping_patience": 2, "train.eval_steps": _often(evidence)}
    if setting(evidence, "method", "lora_dropout") == 0:
        changes["method.lora_dropout"] = 0.05
    measured, trained = curves
    return Finding(
        "D02",
        TITLE,
        "warning",
        sure,
        seen,
        f"The adapter remembers its training rows instead of what they have in common.{few}",
        "Keep the best step instead of the last one, with dropout; more rows, or paraphrases of them, help "
        "most.",
        tune_again("D02", changes),
        {"rows": rows, **figures},
        Plot("Loss", "step", "nats per token", {"held out": measured, "training": trained}),
    )


def _often(evidence: Evidence) -> int:
    total = int(evidence.plan.get("steps") or last_step(evidence))
    every = int(setting(evidence, "train", "eval_steps") or total)
    return max(1, min(every, math.ceil(total / MEASUREMENTS)))


def _end(trained: Points) -> float:
    return fmean(loss for _, loss in trained[-max(2, len(trained) // 10) :])


def _epoch(evidence: Evidence, step: float) -> float:
    return next((epoch for at, epoch in evidence.series("step", "epoch") if at >= step), 0.0)


RULE = Rule(
    "D02",
    TITLE,
    _check,
    "Early stopping as usual in the field (3 %, two measurements); the gap and 0.2 nats: folklore of "
    "fine-tuning, "
    "asked only without a curve. Checked on our own runs.",
    is_live=True,
)
