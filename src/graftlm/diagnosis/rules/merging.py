"""D01: what was merged is not what was trained, most often because it was merged in few bits."""

from __future__ import annotations

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.behaviour import Merged
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule

MAX_KL, MAX_NLL = 1e-3, 0.005
"""Of a merge in 16 or 32 bits: nats per token, and growth of the loss as part of itself."""
MAX_PACKED_KL, MAX_PACKED_NLL = 0.05, 0.03
"""The same in few bits."""
MAX_LOST = 0.1
"""Of what the adapter does: distance of the merge from it, in distances of the base."""
FEW_BITS = ("nf4", "fp4", "int8", "fp8")


def check(evidence: Evidence) -> Finding | None:
    """A merged folder that is farther from base + adapter than its number format explains."""
    merged = evidence.behaviour.merged if evidence.behaviour else None
    if merged is None:
        return None
    if not merged.is_loadable:
        return _finding(merged, 1.0, f"{merged.folder} cannot be loaded: {merged.why_not}")
    worst = max(value / limit for value, limit in _compared(merged))
    if worst <= 1 and not merged.other_files:
        return None
    return _finding(merged, confidence(worst, 1.0, 3.0) if worst > 1 else 1.0, _seen(merged))


def _compared(merged: Merged) -> list[tuple[float, float]]:
    """Figures and their limits."""
    is_packed = merged.stored in FEW_BITS
    found = [(merged.mean_kl, MAX_PACKED_KL if is_packed else MAX_KL)]
    if merged.nll_change is not None:
        found.append((merged.nll_change, MAX_PACKED_NLL if is_packed else MAX_NLL))
    if merged.mean_kl > MAX_KL and merged.effect_kl:
        found.append((merged.mean_kl / merged.effect_kl, MAX_LOST))
    return found


def _seen(merged: Merged) -> str:
    told = [
        f"{merged.folder} ({merged.stored}) is {merged.mean_kl:.2g} nats per token from base + adapter and "
        f"agrees on {100 * merged.top1:.1f} % of the decided tokens"
    ]
    if merged.effect_kl:
        told.append(f"the base without the adapter is {merged.effect_kl:.2g} nats away")
    if merged.nll_change is not None:
        told.append(f"the loss on what the adapter writes is {100 * merged.nll_change:+.1f} %")
    if merged.other_files:
        told.append(f"other than in the base: {', '.join(merged.other_files)}")
    return "; ".join(told) + "."


def _finding(merged: Merged, sure: float, seen: str) -> Finding:
    limit = MAX_PACKED_KL if merged.stored in FEW_BITS else MAX_KL
    meaning = (
        f"The adapter was added to weights in {merged.stored}: rounding takes back part of its change."
        if merged.stored in FEW_BITS
        else "It was merged into other weights than those the adapter was trained on (into the original ones "
        "of a base that was quantised, or into another base), or the folder was changed afterwards."
    )
    bars = {"this merge": merged.mean_kl, "base without adapter": merged.effect_kl or 0.0}
    return Finding(
        rule=RULE.id,
        title=RULE.title,
        severity="error",
        confidence=sure,
        seen=seen,
        meaning=meaning,
        fix="Merge into the weights that the adapter was trained on, dequantised, in 16 bits; quantise the "
        "result with a calibrated method if it has to be small. Or serve the adapter unmerged.",
        command=f"graft merge {merged.adapter} --out RUN-16-bit",
        figures={
            "mean_kl": merged.mean_kl,
            "top1": merged.top1,
            "nll_change": merged.nll_change or 0.0,
            "effect_kl": merged.effect_kl or 0.0,
            "threshold": limit,
        },
        plot=Plot(
            "Distance from base + adapter",
            "",
            "nats per token",
            {"KL": tuple((float(place), value) for place, value in enumerate(bars.values()))},
            threshold=limit,
            kind="bars",
            names=tuple(bars),
        ),
    )


RULE = Rule(
    "D01",
    "The merged model is not the trained one",
    check,
    "Reload envelopes of NeMo Automodel; PEFT's notes on merging into 4 bits; merges of ours in 16 bits stay "
    "below 5e-4 nats per token, a QLoRA adapter merged into the original base is 0.04 away.",
)
