"""D22: an adapter of a model that labels, without the head that labels."""

from __future__ import annotations

from graftlm.diagnosis.confidence import MOST
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import bars

GUESSED = 0.7
"""Where the base is not here: its checkpoint might hold a head."""


def check(evidence: Evidence) -> Finding | None:
    """A base whose checkpoint ends in a trained head needs none."""
    found = evidence.structure
    if found is None or not found.labels or found.head_saved:
        return None
    if found.base is not None and found.base.has_head:
        return None
    return Finding(
        RULE.id,
        RULE.title,
        "error",
        GUESSED if found.base is None else MOST,
        f"The adapter belongs to a model that labels ({found.labels}), and its files hold no head.",
        "The head was neither trained nor saved: every time that the model is loaded it is drawn at random, "
        "and its labels are chance.",
        "Train the head with the adapter: in PEFT by task_type=SEQ_CLS or modules_to_save; Graft does so by "
        "itself.",
        "graft tune ROWS.csv --model MODEL --task classification --out RUN-with-head",
        {"heads": 0.0},
        bars("Heads", "heads", {"needed": 1.0, "saved": 0.0}),
    )


RULE = Rule("D22", "Classification head not saved", check, "PEFT's guide to troubleshooting: modules_to_save")
