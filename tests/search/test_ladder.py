"""The climb stops where held-out rows prove no gain."""

from __future__ import annotations

import pytest

from graftlm.search.ladder import STEPS, climb
from graftlm.search.scores import Score


def scores(*values: float) -> list[Score]:
    """Each with a draw of its own that differs: any two are told apart from a difference of 0.44 on."""
    return [
        Score(value, tuple(value + 0.5 * (draw == index) for draw in range(10)))
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("found", "holder", "following"),
    [
        ((), None, 0),
        ((2.0,), 0, 1),
        ((2.0, 1.0), 1, 2),
        ((2.0, 1.95), 0, 2),  # one step without a proved gain
        ((2.0, 1.95, 1.0), 2, 3),  # and the one after it has it
        ((2.0, 1.95, 1.9, 1.0), 0, None),
    ],
)
def test_where_it_stands(found: tuple[float, ...], holder: int | None, following: int | None) -> None:
    state = climb(scores(*found))
    assert (state.holder, state.next) == (holder, following)


def test_a_step_that_is_not_possible_is_no_miss() -> None:
    first, second = scores(2.0, 1.95)
    assert climb([first, None, None, second]).next == 4


def test_it_says_why_it_stopped() -> None:
    state = climb(scores(2.0, 1.99, 1.98))
    assert state.next is None
    assert "2 steps in a row brought no gain" in state.why and STEPS[2].name in state.why


def test_the_end_of_the_ladder_is_an_end() -> None:
    state = climb([Score(float(-n)) for n in range(len(STEPS))])
    assert state.holder == len(STEPS) - 1 and state.next is None and "no more steps" in state.why
