"""From the smallest method upwards: the next step is taken only while held-out rows prove a gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.search.scores import Score, is_better, noise

PATIENCE = 2
"""Steps without a proved gain after which the climb ends: one may bring nothing (a prompt to a prefix), and
the one after it a lot."""


@dataclass(frozen=True)
class Step:
    """One method of the ladder: what it is called, and the fields of the recipe that make it."""

    name: str
    fields: Mapping[str, Any]


def _low_rank(rank: int, targets: str, kind: str = "lora") -> Mapping[str, Any]:
    fields = {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    return {"method.type": kind, **{f"method.{key}": value for key, value in fields.items()}}


STEPS: tuple[Step, ...] = (
    Step("prompt of 20 tokens", {"method.type": "prompt", "method.num_virtual_tokens": 20}),
    Step("prefix of 20 tokens", {"method.type": "prefix", "method.num_virtual_tokens": 20}),
    Step("LoRA r=4 on attention", _low_rank(4, "attention")),
    Step("LoRA r=8 on attention", _low_rank(8, "attention")),
    Step("LoRA r=8 on all linear layers", _low_rank(8, "all-linear")),
    Step("LoRA r=16 on all linear layers", _low_rank(16, "all-linear")),
    Step("LoRA r=32 on all linear layers", _low_rank(32, "all-linear")),
    Step("DoRA r=32 on all linear layers", _low_rank(32, "all-linear", "dora")),
    Step("every parameter", {"method.type": "full"}),
)
"""By the number of parameters trained, which is not always that of the quality."""


@dataclass(frozen=True)
class Climb:
    """How far a ladder was climbed: `holder` is the highest step that was proved better than the one before
    it (an index, None before the first), `next` the step to try, None where the climb is over."""

    holder: int | None
    next: int | None
    why: str


def climb(found: Sequence[Score | None], steps: Sequence[Step] = STEPS) -> Climb:
    """Where a climb stands after these steps; None is a step that is not possible on this base.

    >>> climb([Score(2.0), Score(1.0), Score(1.0), Score(1.1)]).holder
    1
    """
    holder, misses, why = None, 0, ""
    for index, score in enumerate(found):
        before = None if holder is None else found[holder]
        if score is None:
            continue
        if holder is None or before is None or is_better(score, before):
            holder, misses = index, 0
            continue
        misses += 1
        gain, width = before.value - score.value, noise(score, before)
        why = f"{steps[index].name} gains {gain:+.4f}, noise is {width:.4f}"
        if misses >= PATIENCE:
            text = f"{misses} steps in a row brought no gain beyond the noise of the rows (the last: {why})"
            return Climb(holder, None, text)
    if len(found) >= len(steps):
        return Climb(holder, None, "the ladder has no more steps" + (f"; {why}" if misses else ""))
    return Climb(holder, len(found), "")
