"""A prediction that a run corrects by what was seen of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.planning.correction import Seen, SeenStep, corrected
from graftlm.planning.estimates import Part, TimeEstimate
from graftlm.planning.workload import Workload

WORKLOAD = Workload(
    100, 10, 10_000, 1.0, 1000, 100.0, 400, 400.0, 100.0, 1, 50, 100, 100, mean_step_tokens=400.0
)
ESTIMATE = TimeEstimate(
    parts=tuple(Part(*each) for each in (("load", 5.0), ("evaluate", 8.0), ("steps", 50.0), ("save", 1.0),
                                         ("verify", 2.0))),
    step_seconds=1.0,
    step_parts=(Part("base products", 0.75), Part("operations", 0.25)),
    base_seconds=3.0,
)  # fmt: skip


def _named(estimate: TimeEstimate) -> dict[str, float]:
    return {part.name: part.amount for part in estimate.parts}


def test_nothing_seen_changes_nothing() -> None:
    assert corrected(ESTIMATE, WORKLOAD, Seen(())) is ESTIMATE


def test_steps_as_predicted_change_nothing_but_the_mark() -> None:
    found = corrected(ESTIMATE, WORKLOAD, Seen([SeenStep(1.0, 400)]))
    assert found.is_calibrated
    assert _named(found) == _named(ESTIMATE)


@given(st.floats(0.1, 10), st.floats(40, 4000))
def test_a_slower_machine_is_found_whatever_the_tokens_of_the_seen_step(factor: float, tokens: float) -> None:
    """A step of other tokens takes its operations all the same, and the rest in proportion."""
    seconds = factor * (0.25 + 0.75 * tokens / 400)
    found = corrected(ESTIMATE, WORKLOAD, Seen([SeenStep(seconds, tokens)]))
    assert found.step_seconds == pytest.approx(factor)
    named = _named(found)
    assert named["steps"] == pytest.approx(50 * factor)
    assert named["evaluate"] == pytest.approx(8 * factor)
    assert (named["load"], named["save"]) == (5.0, 1.0), "disk and Python are not arithmetic"
    assert sum(part.amount for part in found.step_parts) == pytest.approx(found.step_seconds)


def test_what_was_measured_stands_for_itself() -> None:
    found = corrected(ESTIMATE, WORKLOAD, Seen([SeenStep(2.0, 400)], {"load": 9.0}, base_measured=4.5))
    named = _named(found)
    assert named["load"] == 9.0
    assert named["evaluate"] == pytest.approx(4.5 + 5.0 * 1.5), "the rest as much slower as the base was"
    assert found.base_seconds == 4.5
