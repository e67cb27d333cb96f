"""D23: several adapters, and the one that was meant is not the one that was trained."""

from __future__ import annotations

from graftlm.diagnosis.confidence import MOST
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import bars
from graftlm.diagnosis.symptoms import Symptom, finding_of

SAVED_ONLY = 0.9
"""From files alone: it might have been added and left as it was on purpose."""


def check(evidence: Evidence) -> Finding | None:
    """By the optimizer where somebody looked at it, and by the files of the adapters."""
    return finding_of(RULE.id, RULE.title, (_in_loop, _in_files), evidence)


def _in_loop(evidence: Evidence) -> Symptom | None:
    loop = None if evidence.structure is None else evidence.structure.loop
    if loop is None or loop.unknown is None or not loop.active or not loop.optimised:
        return None
    idle = [name for name in loop.active if name not in loop.optimised]
    if not idle:
        return None
    return Symptom(
        "error",
        MOST,
        f"Active: {', '.join(loop.active)}. In the optimizer: {', '.join(loop.optimised)}.",
        "The adapter that answers is not the one that learns: it stays as it is, however long the run.",
        "Activate the adapter before the optimizer is made (set_adapter in PEFT, activate and train_only in "
        "Graft).",
        "graft tune ROWS.jsonl --model MODEL --out RUN-trained",
        {"active_and_not_optimised": len(idle)},
        bars("Adapters", "in the optimizer", {name: float(name in loop.optimised) for name in loop.active}),
    )


def _in_files(evidence: Evidence) -> Symptom | None:
    found = evidence.structure
    if found is None or found.files is None or not found.files.outputs:
        return None
    moved = {name: share for name, share in found.siblings.items() if share > 0}
    if found.files.still < found.files.outputs or not moved:
        return None
    return Symptom(
        "error",
        SAVED_ONLY,
        f"All {found.files.outputs:,} places of this adapter are as they started; beside it "
        f"{', '.join(moved)} was trained.",
        "Both were on one model, and the other one was active: what was to be learnt here is there.",
        "Activate this adapter before the optimizer is made (set_adapter in PEFT, activate and train_only in "
        "Graft), and train again.",
        "graft tune ROWS.jsonl --model MODEL --out RUN-trained",
        {"moved": 0.0, "moved_beside": max(moved.values())},
        bars("Places that moved", "share", {"this adapter": 0.0, **moved}),
    )


RULE = Rule(
    "D23", "Another adapter was trained", check, "PEFT's guide to troubleshooting: active adapters; peft#1303"
)
