"""What is known of a run's time before its first step, for the display of what is left."""

from __future__ import annotations

from graftlm.training.time_left import Expected
from graftlm.verbs.prediction import Prediction

BEHIND = ("save", "verify")
"""Parts of a prediction that come behind the last step."""


def expected(prediction: Prediction | None, *, eval_steps: int, base_seconds: float) -> Expected:
    """From the prediction, where there is one, and what measuring the base has really taken: the adapter is
    measured in the same way.

    >>> expected(None, eval_steps=100, base_seconds=12.0).afterwards
    12.0
    """
    if prediction is None:
        return Expected(eval_steps=eval_steps, afterwards=base_seconds)
    behind = sum(part.amount for part in prediction.time.parts if part.name in BEHIND)
    return Expected(prediction.time.step_seconds, 0.0, eval_steps, base_seconds + behind)
