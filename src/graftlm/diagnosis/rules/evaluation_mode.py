"""D30: evaluated with dropout on, or with an adapter that is merged or active in some layers only."""

from __future__ import annotations

from graftlm.diagnosis.confidence import MOST
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.structure import LoopState
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import bars
from graftlm.diagnosis.symptoms import Symptom, finding_of

MEANT: dict[str, str] = {
    "enabled": "enabled",
    "active_adapters": "active",
    "merged_adapters": "merged",
    "requires_grad": "trainable",
}


def check(evidence: Evidence) -> Finding | None:
    """Of a loop that somebody looked at (`graftlm.integrations.loop_state`)."""
    return finding_of(RULE.id, RULE.title, (_random, _irregular), evidence)


def _random(evidence: Evidence) -> Symptom | None:
    loop = _loop(evidence)
    if loop is None or not (loop.dropouts or loop.repeat_difference):
        return None
    count, difference = loop.dropouts or 0, loop.repeat_difference
    repeated = f" The same input gave logits that differ by {difference:.2g}." if difference else ""
    return Symptom(
        "error",
        MOST,
        f"While the model was evaluated, {count:,} dropout layers were active.{repeated}",
        "Scores are those of a damaged model, and differ from one evaluation to the next.",
        "Call model.eval() before every evaluation, and model.train() after it.",
        "graft eval RUN --data ROWS.jsonl",
        {"active_dropouts": count, "repeat_difference": difference or 0.0},
        bars("Dropout layers in the evaluation", "layers", {"active": count}),
    )


def _irregular(evidence: Evidence) -> Symptom | None:
    loop = _loop(evidence)
    if loop is None or not loop.irregular:
        return None
    named = ", ".join(MEANT.get(name, name) for name in loop.irregular)
    return Symptom(
        "error",
        MOST,
        f"Layers differ in what is {named}.",
        "Part of the adapter acts twice, or not at all: the model is neither the base nor what was trained.",
        "Load base and adapter again, and merge or activate all of it.",
        "graft eval RUN --data ROWS.jsonl",
        {"irregular": len(loop.irregular)},
        bars("State of the layers", "irregular", dict.fromkeys(map(str, loop.irregular), 1.0)),
    )


def _loop(evidence: Evidence) -> LoopState | None:
    return None if evidence.structure is None else evidence.structure.loop


RULE = Rule("D30", "Evaluated in training mode, or partly merged", check, "PEFT's model status: `irregular`")
