"""D10: where several adapters are served, an answer comes from another one than was asked for."""

from __future__ import annotations

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.behaviour import Canary
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule

MAX_KL = 1e-3
"""Nats between an answer and what its adapter says alone: other shapes of a batch stay well below."""
MIXED = 0.1
"""The same as part of the distance to the nearest other adapter: another number format stays well below."""


def check(evidence: Evidence) -> Finding | None:
    """Canaries whose answers are not those of their own adapter."""
    facts = evidence.behaviour
    canaries = facts.canaries if facts else None
    wrong = [canary for canary in canaries or () if canary.to_own > _limit(canary)]
    if facts is None or not canaries or not wrong:
        return None
    asked = "".join(f" --beside {each.folder}" for each in canaries[1:])
    asked += f" --served {facts.served}" if facts.served else ""
    worst = max(wrong, key=lambda canary: canary.to_own)
    return Finding(
        rule=RULE.id,
        title=RULE.title,
        severity="error",
        confidence=confidence(worst.to_own, _limit(worst), 3 * _limit(worst)),
        seen=f"{len(wrong)} of {len(canaries)} adapters do not answer as themselves. {_who(worst)}.",
        meaning="What one adapter computed is used for another one: keys and values kept under the prompt or "
        "the adapter's name, rows sent to the wrong adapter, or an adapter that was changed in place.",
        fix="Keep cached keys and values under the digest of the adapter's content, and drop them when an "
        f"adapter is changed; then ask again. Digests: {_digests(canaries)}.",
        command=f"graft diagnose RUN{asked}",
        figures={"to_own": worst.to_own, "to_nearest": worst.to_nearest, "threshold": _limit(worst)},
        plot=Plot(
            "Answers to canary prompts",
            "",
            "nats from the adapter that was asked for",
            {"KL": tuple((float(place), canary.to_own) for place, canary in enumerate(canaries))},
            threshold=_limit(worst),
            kind="bars",
            names=tuple(canary.name for canary in canaries),
        ),
    )


def _limit(canary: Canary) -> float:
    return max(MAX_KL, MIXED * canary.apart)


def _who(canary: Canary) -> str:
    told = f"Asked for {canary.name}, the answers are {canary.to_own:.2g} nats from what it says alone"
    if canary.nearest == canary.name:
        return told
    if canary.to_nearest <= MAX_KL:
        return f"{told}: they are those of {canary.nearest}"
    return f"{told}, and {canary.to_nearest:.2g} from {canary.nearest}"


def _digests(canaries: tuple[Canary, ...]) -> str:
    return ", ".join(f"{canary.name} {canary.digest[:12]}" for canary in canaries)


RULE = Rule(
    "D10",
    "Serving mixes adapters",
    check,
    "Servers that keyed cached keys and values by name (vLLM 30931, 42125; llama.cpp 26207); a mixed batch "
    "of ours is within 1e-5 nats of each adapter alone in float32, a server in another number format within "
    "0.01.",
)
