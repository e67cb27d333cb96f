"""D06: memory runs out."""

from __future__ import annotations

from graftlm.diagnosis.commands import tune_again
from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.run_figures import end_of, setting

TITLE = "Out of memory"
BEGINS = "Out of memory"
TIGHT = 0.9
"""Of the free memory, by the plan."""
PER_STEP = ("forward", "backward")
GIB = 2**30


def _check(evidence: Evidence) -> Finding | None:
    end = end_of(evidence)
    error = end.get("error") or {}
    if end.get("why") == "failed" and str(error.get("seen", "")).startswith(BEGINS):
        return _caught(evidence, str(end.get("phase") or ""), str(error["seen"]))
    return _predicted(evidence) if not evidence.is_over else None


def _caught(evidence: Evidence, phase: str, said: str) -> Finding:
    changes, words = _fix(evidence, phase)
    step = max((int(event.get("step") or 0) for event in evidence.events), default=0)
    where = f" in {phase}" if phase else ""
    meaning = (
        "The activations of one micro-batch do not fit beside the model."
        if phase in PER_STEP
        else "The optimizer's state comes with the first update, and did not fit any more."
        if phase == "update"
        else "What this stage needs does not fit."
    )
    return Finding(
        "D06",
        f"{TITLE}{where}",
        "error",
        0.99,
        f"After {step} steps: {said}",
        meaning,
        words,
        tune_again("D06", changes) if changes else "",
        {
            "steps": step,
            "predicted": _bytes(evidence, "activation_bytes"),
            "free": _bytes(evidence, "free_bytes"),
        },
        _peaks(evidence),
    )


def _predicted(evidence: Evidence) -> Finding | None:
    needed, free = _bytes(evidence, "activation_bytes"), _bytes(evidence, "free_bytes")
    if free <= 0 or needed <= TIGHT * free:
        return None
    changes, words = _fix(evidence, "forward")
    return Finding(
        "D06",
        "Memory is tight",
        "warning",
        confidence(needed / free, TIGHT, 1.2),
        f"One micro-batch needs {needed / GIB:.2f} GiB by the plan, and {free / GIB:.2f} GiB were free.",
        "The run may end in forward or backward as soon as the longest rows come.",
        words,
        tune_again("D06", changes) if changes else "",
        {"predicted": needed, "free": free},
        Plot(
            "Memory by the plan",
            "",
            "GiB",
            {"": ((0, needed / GIB), (1, free / GIB))},
            None,
            "bars",
            ("needed", "free"),
        ),
    )


def _fix(evidence: Evidence, phase: str) -> tuple[dict[str, object], str]:
    """A ladder: first what gives the same result, then what costs time, then what changes numbers."""
    size = int(setting(evidence, "train", "per_device_train_batch_size") or 1)
    passes = int(setting(evidence, "train", "gradient_accumulation_steps") or 1)
    if phase == "update" and setting(evidence, "train", "optim") == "adamw":
        return {"train.optim": "adamw_8bit"}, "Keep the optimizer's state in 8 bits."
    if phase in PER_STEP and size > 1:
        smaller: dict[str, object] = {
            "train.per_device_train_batch_size": size // 2,
            "train.gradient_accumulation_steps": passes * size // (size // 2),
        }
        return (
            smaller,
            "Halve the micro-batch and double the passes per step: the same result in less memory.",
        )
    if phase in PER_STEP and evidence.plan.get("recompute") != "everything":
        return {
            "train.recompute": "everything"
        }, "Compute activations again in backward instead of keeping them."
    if setting(evidence, "model", "quantization") == "none":
        return {"model.quantization": "nf4"}, "Store the base in 4 bits."
    if phase in PER_STEP and (length := int(setting(evidence, "data", "max_length") or 0)) > 8:
        return {
            "data.max_length": length // 2
        }, "Cut rows at half the length: answers may be cut off (graft check)."
    return {}, "Take a smaller base or a larger machine: graft plan says what fits."


def _bytes(evidence: Evidence, name: str) -> float:
    found = evidence.plan.get(name)
    return float(found) if isinstance(found, int | float) else 0.0


def _peaks(evidence: Evidence) -> Plot | None:
    """The process's memory, step by step, where some were taken."""
    points = evidence.series("step", "memory_bytes")
    if len(points) < 2:
        return None
    return Plot("Peak memory so far", "step", "GiB", {"peak": tuple((s, b / GIB) for s, b in points)})


RULE = Rule(
    "D06",
    TITLE,
    _check,
    "Composer's and accelerate's ladders, with the batch of a step kept; 90 %: proposal.",
    is_live=True,
)
