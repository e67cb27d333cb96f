"""D27: preference tuning that learns nothing, or that makes the chosen answers unlikely as well."""

from __future__ import annotations

import math
from shlex import quote

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot, Points
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.series import late
from graftlm.diagnosis.symptoms import Symptom, finding_of, learning_rate

TASKS = ("dpo", "ipo", "simpo", "orpo")
COIN_TOSS = 0.05
"""Distance from one half up to which a reward accuracy says nothing; half a standard error comes on top."""
FEWEST_PAIRS = 30
"""Held-out pairs from which on it can be told from one half at all."""
DISPLACED = 0.30
"""Growth of the loss of the chosen answers, as part of itself."""
MARGIN = 10.0
"""Difference of rewards from which on the loss of a pair is nothing any more."""
LONGER = 1.5
"""Length of the answers, in lengths of the base's."""
EARLY = 0.2
"""Share of the steps before which nothing is judged."""


def check(evidence: Evidence) -> Finding | None:
    """The surest of the symptoms; the others are told with it."""
    if evidence.task not in TASKS or not _is_begun(evidence):
        return None
    looks = (_displaced, _saturated, _coin_toss, _long)
    return finding_of(RULE.id, RULE.title, looks, evidence)


def _displaced(evidence: Evidence) -> Symptom | None:
    """Chosen answers that are less likely than under the reference."""
    growth = _chosen_growth(evidence)
    if len(growth) < 2 or (now := late(growth)) <= DISPLACED:
        return None
    leads = late(evidence.series("step", "metrics.rewards/margins")) > 0
    return Symptom(
        "error" if now > 1 else "warning",
        confidence(now, DISPLACED, 3 * DISPLACED),
        f"The loss of the chosen answers grew by {100 * now:.0f} %"
        + (" while their lead over the rejected ones grew too." if leads else "; they lead no longer."),
        "The loss is content when the rejected answers fall faster than the chosen ones: both become "
        "unlikely, and what the policy writes is neither."
        if leads
        else "The steps are too large: all answers become unlikely, the chosen ones too.",
        "Smaller steps, and the term that keeps the chosen answers likely (loss_type sft); or a larger beta.",
        _gentler(evidence, 0.1 if now > 1 else 1 / 3),
        {"chosen_loss_growth": now, "threshold": DISPLACED},
        Plot(
            "Loss of the chosen answers against the reference",
            "step",
            "growth",
            {"growth": growth},
            threshold=DISPLACED,
        ),
    )


def _chosen_growth(evidence: Evidence) -> Points:
    """By how much of itself the loss of the chosen answers grew since the start, by step."""
    if evidence.task in ("dpo", "ipo"):
        beta = _beta(evidence)
        rewards = dict(evidence.series("step", "metrics.rewards/chosen"))
        sums = evidence.series("step", "metrics.logps/chosen")
        known = [(step, now, now - rewards[step] / beta) for step, now in sums if step in rewards]
        return tuple((step, now / before - 1) for step, now, before in known if before < 0)
    held = evidence.series("evaluate", "metrics.logps/chosen")
    return tuple((step, now / held[0][1] - 1) for step, now in held if held[0][1] < 0)


def _saturated(evidence: Evidence) -> Symptom | None:
    """Margins so wide that nothing is left to learn but to widen them."""
    margins = evidence.series("step", "metrics.rewards/margins")
    if evidence.task != "dpo" or len(margins) < 2 or (now := late(margins)) <= MARGIN:
        return None
    return Symptom(
        "warning",
        confidence(now, MARGIN, 3 * MARGIN),
        f"The chosen answers' rewards lead by {now:.1f} on average.",
        "Beyond about 10 the loss of a pair is nothing: the policy is only driven further from its base.",
        "Fewer steps, smaller ones, and the term that keeps the chosen answers likely (loss_type sft).",
        _gentler(evidence, 1 / 3),
        {"margin": now, "margin_threshold": MARGIN},
        Plot("Margin of the rewards", "step", "margin", {"margin": margins}, threshold=MARGIN),
    )


def _coin_toss(evidence: Evidence) -> Symptom | None:
    """Held-out pairs that are not told apart, whatever was learnt of those in training."""
    told = evidence.series("step", "metrics.rewards/accuracies")
    held = evidence.series("evaluate", "metrics.rewards/accuracies")
    rows = evidence.series("evaluate", "rows")
    if not evidence.is_over or not told or not held or not rows or rows[-1][1] < FEWEST_PAIRS:
        return None
    in_training, on_held_out = late(told), held[-1][1]
    noise = COIN_TOSS + 0.5 * math.sqrt(0.25 / rows[-1][1])
    far, data = abs(on_held_out - 0.5), evidence.recipe.get("data", {}).get("path", "DATA")
    if far > noise:
        return None
    return Symptom(
        "warning",
        confidence(far, noise, 0.0),
        f"After {told[-1][0]:.0f} steps the chosen answer has the higher reward in {100 * on_held_out:.0f} % "
        f"of {rows[-1][1]:.0f} held-out pairs, a coin toss; in training in {100 * in_training:.0f} %.",
        "What is learnt is not what makes an answer chosen: pairs contradict each other, chosen and rejected "
        "are mixed up in some, or the policy hardly moves.",
        "Look at the pairs and keep those that are clear; where they are, give more of them, or take larger "
        "steps.",
        f"graft check {quote(str(data))} --task {evidence.task}",
        {"held_out_accuracy": on_held_out, "accuracy": in_training, "noise": noise},
        Plot("Pairs told apart", "step", "share", {"training": told, "held out": held}, threshold=0.5),
    )


def _long(evidence: Evidence) -> Symptom | None:
    """Answers that became long: length is the easiest thing to learn from pairs."""
    lengths = evidence.behaviour.answer_tokens if evidence.behaviour else None
    if lengths is None or lengths.before <= 0 or lengths.before + lengths.low <= LONGER * lengths.before:
        return None
    ratio = lengths.after / lengths.before
    return Symptom(
        "warning",
        confidence(ratio, LONGER, 3 * LONGER),
        f"Answers have {lengths.after:.0f} tokens on average, the base's {lengths.before:.0f}.",
        "In most preference data the chosen answers are longer; the policy learnt the length.",
        "A loss that does not pay for length.",
        "graft tune RUN/recipe.yaml --set task.type=simpo --out RUN-by-length",
        {"length_ratio": ratio, "length_threshold": LONGER},
        Plot(
            "Length of the answers",
            "",
            "tokens",
            {"tokens": ((0.0, lengths.before), (1.0, lengths.after))},
            threshold=LONGER * lengths.before,
            kind="bars",
            names=("base", "adapter"),
        ),
    )


def _is_begun(evidence: Evidence) -> bool:
    steps = evidence.series("step", "loss")
    total = next((e.get("total_steps", 0) for e in reversed(evidence.events) if e.get("kind") == "start"), 0)
    return bool(steps) and (evidence.is_over or steps[-1][0] >= max(2.0, EARLY * total))


def _gentler(evidence: Evidence, factor: float) -> str:
    """Smaller steps, and where the loss can be joined with it, imitation of the chosen answers."""
    joined = {"dpo": " --set 'task.loss_type=[sigmoid,sft]'", "ipo": " --set 'task.loss_type=[ipo,sft]'"}
    rate = learning_rate(evidence, factor)
    return (
        f"graft tune RUN/recipe.yaml --set train.learning_rate={rate}{joined.get(evidence.task, '')} "
        "--out RUN-gentler"
    )


def _beta(evidence: Evidence) -> float:
    task = evidence.recipe.get("task", {})
    return float(task.get("beta", 0.1)) if isinstance(task, dict) else 0.1


RULE = Rule(
    "D27",
    "Preference tuning degenerates",
    check,
    "Falling chosen likelihood (arXiv 2404.19733, 2410.08847), the figures that TRL logs; thresholds on real "
    "runs of ours.",
    is_live=True,
)
