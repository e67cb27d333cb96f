"""The time that is left of a run, from its events."""

from __future__ import annotations

from typing import Any

import pytest

from graftlm.training.callbacks import Event
from graftlm.training.time_left import RECENT, Expected, TimeLeft


class Clock:
    """A clock that somebody sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _step(number: int, seconds: float) -> Event:
    return Event("step", {"step": number, "seconds": seconds})


def _started(total: int, done: int = 0, **fields: Any) -> TimeLeft:
    left = TimeLeft(Expected(**fields))
    left(Event("start", {"total_steps": total, "start_step": done}))
    return left


def test_nothing_is_known_before_the_first_step_unless_it_was_predicted() -> None:
    left = _started(10)
    assert (left.seconds, left.text) == (None, "-")
    assert _started(10, step=6.0).text == "0:01:00"
    assert _started(10, 4, step=6.0).seconds == 36.0


def test_the_first_step_counts_only_until_the_second() -> None:
    left = _started(10, step=1.0)
    left(_step(1, 20.0))
    assert left.seconds == 9 * 20.0
    left(_step(2, 2.0))
    assert left.seconds == 8 * 2.0
    left(_step(3, 4.0))
    assert left.seconds == 7 * 3.0


def test_recent_steps_count() -> None:
    left = _started(1000)
    for number in range(1, 60):
        left(_step(number, 9.0))
    for number in range(60, 60 + RECENT):
        left(_step(number, 1.0))
    assert left.seconds == pytest.approx(1000 - 59 - RECENT)


def test_a_skipped_step_is_one_less() -> None:
    left = _started(10, step=2.0)
    left(Event("skipped", {"step": 1, "why": "", "rows": ()}))
    assert left.seconds == 18.0


@pytest.mark.parametrize(
    ("total", "every", "at", "count"),
    [
        (10, 0, 0, 0),
        (10, 5, 0, 2),
        (10, 4, 0, 3),
        (10, 4, 4, 2),
        (10, 4, 9, 1),
        (10, 100, 3, 1),
        (10, 5, 10, 0),
    ],
)
def test_measurements_on_the_way_are_counted(total: int, every: int, at: int, count: int) -> None:
    left = _started(total, at, step=1.0, evaluation=100.0, eval_steps=every)
    assert left.seconds == (total - at) * 1.0 + count * 100.0


def test_measurements_are_timed_when_they_come() -> None:
    clock = Clock()
    left = TimeLeft(Expected(step=1.0, eval_steps=5, afterwards=7.0), clock=clock)
    left(Event("start", {"total_steps": 10, "start_step": 0}))
    for number in range(1, 6):
        clock.now += 1.0
        left(_step(number, 1.0))
    assert left.seconds == 5.0 + 7.0
    clock.now += 30.0
    left(Event("evaluate", {"step": 5, "loss": 1.0}))
    assert left.seconds == 5.0 + 30.0 + 7.0
