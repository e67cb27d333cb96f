"""D13 and D14: numbers that are none, from 16-bit floats that overflow, and otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from graftlm.diagnosis.commands import tune_again
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.run_figures import end_of, last_step, rates, setting

FP16 = "float16"
HIGH_RATE = 3.0
SHOWN = 8
NOT_FINITE, NO_NUMBERS = "not finite", "computes no numbers"
REFUSED = "No such step was applied to this run's weights: they are sound, but the steps are lost."
SPREAD = (
    "One step with a NaN spreads to every weight. Trainers that log a running average in its place hide it."
)
TEXTS = ("nan", "inf", "-inf")
"""How the log spells what JSON lacks."""


def _overflow(evidence: Evidence) -> Finding | None:
    if FP16 not in (evidence.plan.get("dtype"), setting(evidence, "model", "dtype"), _quantised_in(evidence)):
        return None
    refused, losses = _refused(evidence), _broken_losses(evidence)
    if not (refused or losses or _stopped(evidence)):
        return None
    key = (
        "model.dtype"
        if setting(evidence, "model", "quantization") in (None, "none")
        else "model.compute_dtype"
    )
    return Finding(
        "D13",
        "float16 overflows",
        "error",
        0.95,
        _counted(refused, losses, evidence),
        "float16 ends at 65,504. Models that were trained in bfloat16, which ends at 3e38, can have larger "
        "values "
        "inside: they become infinite, and the loss is no number.",
        "Compute in bfloat16 (or float32).",
        tune_again("D13", {key: "bfloat16"}),
        {"refused": len(refused), "steps": last_step(evidence) or len(refused)},
        _plot(evidence),
    )


def _not_finite(evidence: Evidence) -> Finding | None:
    refused, losses = _refused(evidence), _broken_losses(evidence)
    broken = evidence.adapter.not_finite if evidence.adapter is not None else ()
    stopped = _stopped(evidence)
    if not (refused or losses or broken or stopped) or _overflow(evidence) is not None:
        return None
    rate, usual = rates(evidence)
    is_fast = rate is not None and usual is not None and rate >= HIGH_RATE * usual
    seen = _counted(refused, losses, evidence)
    if broken:
        seen = (
            f"{seen} {len(broken)} tensors of the adapter hold NaN or infinity: {', '.join(broken[:SHOWN])}."
        )
    if is_fast and not broken:
        fix, command = (
            f"Take a learning rate of {usual:.1e}.",
            tune_again("D14", {"train.learning_rate": usual}),
        )
    elif broken:
        fix, command = "Do not use this adapter; train it again, with a loop that refuses such steps.", ""
    else:
        fix = "Look at these rows and at the base: rows that always fail are broken, or meet a broken weight."
        command = (
            f"graft check {setting(evidence, 'data', 'path')} --model {setting(evidence, 'model', 'name')}"
        )
    return Finding(
        "D14",
        "Loss or gradients are no numbers",
        "error",
        0.99 if broken or len(refused) > 1 else 0.8,
        seen.strip(),
        SPREAD if broken else REFUSED,
        fix,
        command,
        {"refused": len(refused), "broken_tensors": len(broken)},
        _plot(evidence),
    )


def _refused(evidence: Evidence) -> list[Mapping[str, Any]]:
    events = (event for event in evidence.events if event.get("kind") == "skipped")
    return [event for event in events if str(event.get("why", "")).startswith(NOT_FINITE)]


def _stopped(evidence: Evidence) -> str:
    """What the run said when it ended because its base computes no numbers."""
    said = str((end_of(evidence).get("error") or {}).get("seen", ""))
    return said if NO_NUMBERS in said else ""


def _broken_losses(evidence: Evidence) -> int:
    """Measurements on held-out rows that gave no number."""
    return sum(event.get("kind") == "evaluate" and event.get("loss") in TEXTS for event in evidence.events)


def _quantised_in(evidence: Evidence) -> Any:
    is_packed = setting(evidence, "model", "quantization") not in (None, "none")
    return setting(evidence, "model", "compute_dtype") if is_packed else None


def _counted(refused: list[Mapping[str, Any]], losses: int, evidence: Evidence) -> str:
    said = []
    if refused:
        rows = Counter(int(row) for event in refused for row in event.get("rows") or ())
        most = max(rows.values(), default=0)
        named = [row for row, count in rows.items() if count == most]
        shown = ", ".join(map(str, sorted(named)[:SHOWN])) + (" ..." if len(named) > SHOWN else "")
        most_of = "it" if len(refused) == 1 else "most"
        said.append(
            f"Loss or gradients were no numbers in {_count(len(refused), 'step')}, which had to be refused, "
            f"first in step {refused[0].get('step')}. Rows that were in {most_of}: {shown}."
        )
    if losses:
        said.append(f"{_count(losses, 'measurement')} of the held-out loss gave no number.")
    return " ".join([*said, *filter(None, [_stopped(evidence)])])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _plot(evidence: Evidence) -> Plot | None:
    """The loss, and where there was none."""
    refused = tuple((float(event["step"]), float(n)) for n, event in enumerate(_refused(evidence), start=1))
    lines = {"training loss": evidence.series("step", "loss"), "steps refused so far": refused}
    shown = {name: points for name, points in lines.items() if points}
    return Plot("Loss and refused steps", "step", "", shown) if refused else None


OVERFLOW = Rule(
    "D13",
    "float16 overflows",
    _overflow,
    "65,504 is the format's end; Gemma 3 and others exceed it (Kaitchup, unsloth-zoo 600).",
    is_live=True,
)
RULE = Rule(
    "D14",
    "Loss or gradients are no numbers",
    _not_finite,
    "TRL 6702: trainers that hide NaN in the log while they apply it.",
    is_live=True,
)
