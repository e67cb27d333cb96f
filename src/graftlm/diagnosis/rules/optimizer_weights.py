"""D29: the optimizer does not hold the weights that are trained."""

from __future__ import annotations

from graftlm.diagnosis.confidence import MOST
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import bars
from graftlm.diagnosis.symptoms import Symptom, finding_of

LIKELY, POSSIBLE = 0.95, 0.7
"""With a trainer's log of steps beside the adapter, and without: it may have been saved before training."""


def check(evidence: Evidence) -> Finding | None:
    """By the optimizer where somebody looked at it, else by an adapter that is all as it started."""
    return finding_of(RULE.id, RULE.title, (_in_loop, _in_files), evidence)


def _in_loop(evidence: Evidence) -> Symptom | None:
    loop = None if evidence.structure is None else evidence.structure.loop
    if loop is None or not loop.unknown:
        return None
    stale = f" It holds {loop.stale:,} that are no part of the model." if loop.stale else ""
    return Symptom(
        "error",
        MOST,
        f"The optimizer does not hold {loop.unknown:,} of {loop.trainable:,} trainable tensors "
        f"({', '.join(loop.examples)} ...).{stale}",
        "They get gradients and are never updated: the optimizer was made before the adapter was attached, "
        "or before the model was moved, copied or wrapped.",
        "Make the optimizer last, from the parameters of the model as it is trained.",
        "graft tune ROWS.jsonl --model MODEL --out RUN-trained",
        {"unknown": loop.unknown, "trainable": loop.trainable},
        bars(
            "Trainable tensors",
            "tensors",
            {"held by the optimizer": loop.trainable - loop.unknown, "not held": loop.unknown},
        ),
    )


def _in_files(evidence: Evidence) -> Symptom | None:
    found = evidence.structure
    if found is None or found.files is None or not found.files.outputs:
        return None
    is_still = found.files.still == found.files.outputs
    if not is_still or any(found.siblings.values()):  # the latter is D23
        return None
    if found.logged_steps == 0 or (evidence.recipe and not evidence.is_over):
        return None
    steps = f" after {found.logged_steps:,} steps" if found.logged_steps else ""
    return Symptom(
        "error",
        LIKELY if found.logged_steps or evidence.recipe else POSSIBLE,
        f"All {found.files.outputs:,} places of the adapter are as they started{steps}: it changes nothing.",
        "The optimizer never saw these weights: it was made before the adapter was attached, or it holds "
        "those of a copy of the model.",
        "Make the optimizer last, from the parameters of the model as it is trained.",
        "graft tune ROWS.jsonl --model MODEL --out RUN-trained",
        {"moved": 0.0, "places": found.files.outputs},
        bars("Places that moved", "places", {"moved": 0, "as they started": found.files.still}),
    )


RULE = Rule(
    "D29", "The optimizer never saw the weights", check, "PEFT's guide to troubleshooting; transformers#26334"
)
