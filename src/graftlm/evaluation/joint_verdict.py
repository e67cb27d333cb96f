"""The verdict on a run of several tasks: each is judged as in a run of its own, and the worst one decides."""

from __future__ import annotations

from graftlm.evaluation.compare import compare
from graftlm.evaluation.parts import parted
from graftlm.evaluation.runner import Evaluation
from graftlm.evaluation.verdict import Outcome, Verdict, verdict

WORST: tuple[Outcome, ...] = ("FAIL", "INSUFFICIENT", "PASS")


def joint_verdict(before: Evaluation, after: Evaluation) -> Verdict:
    """Judge evaluations of several tasks (`evaluation.parts.joined`).

    Raises:
        DataError: they are of different rows.
    """
    old, new = parted(before), parted(after)
    found = {name: verdict(compare(old[name], new[name])) for name in new}
    outcome = min((judged.outcome for judged in found.values()), key=WORST.index)
    return Verdict(outcome, " ".join(f"{name}: {judged.text}" for name, judged in found.items()))
