"""D12: gradients do not reach some of the layers that are trained."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule

TITLE = "Gradients never reach some layers"
STEPS = 3
"""After which every B must have left zero."""
SHOWN = 5
DID_NOT_RUN = "layers did not run"


def _check(evidence: Evidence) -> Finding | None:
    return _live(evidence) or _afterwards(evidence)


def _live(evidence: Evidence) -> Finding | None:
    measured = [
        event for event in evidence.events if event.get("kind") == "adapter" and event["done"] >= STEPS
    ]
    if not measured or measured[-1]["moved"] == 1 or _is_meant(evidence):
        return None
    last = measured[-1]
    return _finding(last["still"], 1 - last["moved"], f"after {last['done']} steps", ())


def _afterwards(evidence: Evidence) -> Finding | None:
    facts = evidence.adapter
    if facts is None or not facts.still or not facts.layers or _is_meant(evidence):
        return None
    others = facts.trained - len(facts.still)
    if others == 0:
        return None  # nothing was trained at all: another failure
    norms = tuple((layer.path, layer.square**0.5) for layer in facts.layers)
    return _finding(facts.still, len(facts.still) / facts.trained, "in the trained adapter", norms)


def _is_meant(evidence: Evidence) -> bool:
    """Experts that no token chose, or a part of the model for images, did not even run."""
    return any(DID_NOT_RUN in str(event.get("text", "")) for event in evidence.events)


def _finding(still: Sequence[str], share: float, when: str, norms: Sequence[tuple[str, float]]) -> Finding:
    named = ", ".join(still[:SHOWN]) + (" ..." if len(still) > SHOWN else "")
    bars = tuple((float(place), norm) for place, (_, norm) in enumerate(norms))
    return Finding(
        "D12",
        TITLE,
        "error",
        confidence(share, 0.0, 0.5),
        f"{100 * share:.0f} % of the trained places are exactly as they started {when}: {named}.",
        "The change of a layer that learns leaves zero with the first update. Something cuts the graph: "
        "checkpointing "
        "that needs inputs with gradients (use_reentrant) on a frozen embedding, parameters that were frozen "
        "again, "
        "or layers that the forward pass does not use.",
        "Call model.enable_input_require_grads() or checkpoint with use_reentrant=False, and see that "
        "requires_grad is set on every trained layer; graft tune does both, and stops when a gradient is "
        "missing.",
        "",
        {"still": share},
        Plot(
            "Norm of the change",
            "layer",
            "Frobenius norm",
            {"norm": bars},
            None,
            "bars",
            tuple(n for n, _ in norms),
        )
        if norms
        else None,
    )


RULE = Rule(
    "D12",
    TITLE,
    _check,
    "PEFT's troubleshooting guide: compare weights after three steps; open-unlearning 178 (only some layers "
    "trained).",
    is_live=True,
)
