"""D05: the change of a weight grows larger than the weight: alpha / r or the learning rate is too large."""

from __future__ import annotations

import math

from graftlm.diagnosis.commands import tune_again
from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot, Points
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.run_figures import losses, rates, setting, spikes

TITLE = "Update too large"
SIZE, CERTAIN_SIZE = 1.0, 4.0
"""Norm of the change of a weight over that of the weight. Runs that went well ended between 0.01 and 0.6."""
LEAST, GROWTH, BEFORE = 0.01, 3.0, 10
"""What makes a spike of the loss the update's: its size, and by how much it grew within so many steps."""
MOST_STEPS = 2
"""Measurements that are left out: a start from zero grows without bound at first."""
USUAL_SCALE, LARGE_SCALE, LARGE_RATE = 2.0, 8.0, 3.0
"""alpha / r that is usual and that is large; times the usual learning rate that is large."""


def _check(evidence: Evidence) -> Finding | None:
    sizes = evidence.series("adapter", "largest")[MOST_STEPS:]
    if not sizes:
        return None
    return _oversized(evidence, sizes) or _with_spike(evidence, sizes)


def _oversized(evidence: Evidence, sizes: Points) -> Finding | None:
    largest = max(size for _, size in sizes)
    if largest < SIZE:
        return None
    step = next(at for at, size in sizes if size >= SIZE)
    seen = (
        f"From step {step:.0f} on the change of a weight was larger than the weight itself; at worst "
        f"{largest:.3g} times, at {_where(evidence)}."
    )
    # On a logarithmic scale: such updates grow by factors.
    sure = confidence(math.log(largest), math.log(SIZE), math.log(CERTAIN_SIZE))
    return _finding(evidence, sizes, seen, sure, {"largest": largest, "from_step": step})


def _with_spike(evidence: Evidence, sizes: Points) -> Finding | None:
    for step, deviations in spikes(losses(evidence)):
        now = _at(sizes, step)
        earlier = _at(sizes, step - BEFORE)
        if now is None or earlier is None or now < LEAST or now < GROWTH * earlier:
            continue
        seen = (
            f"The loss leapt up at step {step:.0f} ({deviations:.0f} robust deviations), and the change of a "
            "weight "
            f"had grown {now / max(earlier, 1e-12):.1f} times within {BEFORE} steps, to {100 * now:.1f} % of "
            "it."
        )
        figures = {"largest": now, "growth": now / max(earlier, 1e-12), "deviations": deviations}
        return _finding(evidence, sizes, seen, 0.8, figures)
    return None


def _finding(evidence: Evidence, sizes: Points, seen: str, sure: float, figures: dict[str, float]) -> Finding:
    scale, (rate, usual) = _scale(evidence), rates(evidence)
    changes: dict[str, object] = {}
    causes = []
    if rate is not None and usual is not None and rate >= LARGE_RATE * usual:
        changes["train.learning_rate"] = usual
        causes.append(f"the learning rate is {rate / usual:.3g} times the usual one")
    if scale is not None and scale > LARGE_SCALE:
        changes["method.lora_alpha"] = int(USUAL_SCALE * int(setting(evidence, "method", "r") or 1))
        causes.append(f"alpha / r is {scale:.3g}")
    if not changes and rate is not None:
        changes = {"train.learning_rate": rate / 3, "train.warmup_ratio": 0.05}
    fixes = {
        "train.learning_rate": "lower the learning rate",
        "method.lora_alpha": "lower alpha (2 r is usual; for high ranks use_rslora)",
        "train.warmup_ratio": "warm up longer",
    }
    words = ", ".join(fixes[key] for key in changes)
    return Finding(
        "D05",
        TITLE,
        "error" if figures["largest"] >= SIZE else "warning",
        sure,
        seen,
        "The adapter overrules the base instead of correcting it; "
        f"{' and '.join(causes) or 'its steps are too large'}.",
        f"{words[:1].upper()}{words[1:]}.",
        tune_again("D05", changes) if changes else "",
        figures | ({"scale": scale} if scale is not None else {}),
        Plot("Largest change of a weight", "step", "times the weight", {"change": sizes}, SIZE),
    )


def _scale(evidence: Evidence) -> float | None:
    r, alpha = setting(evidence, "method", "r"), setting(evidence, "method", "lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1:
        return None
    return alpha / math.sqrt(r) if setting(evidence, "method", "use_rslora") else alpha / r


def _at(sizes: Points, step: float) -> float | None:
    return next((size for at, size in reversed(sizes) if at <= step), None)


def _where(evidence: Evidence) -> str:
    events = [event for event in evidence.events if event.get("kind") == "adapter" and "largest" in event]
    return str(max(events, key=lambda event: event["largest"])["largest_at"])


RULE = Rule(
    "D05",
    TITLE,
    _check,
    "What is measured and the spike: proposal after arXiv 2312.03732 (rsLoRA) and OLMo-core's spikes; alpha "
    "/ r by "
    "itself condemns nothing (arXiv 2606.12883). The size: our own runs.",
    is_live=True,
)
