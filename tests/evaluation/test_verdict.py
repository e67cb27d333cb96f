from __future__ import annotations

import pytest

from graftlm.evaluation.compare import Comparison, Forgetting, ShareChange
from graftlm.evaluation.metrics import Interval, LossChange, mcnemar, share_of
from graftlm.evaluation.verdict import verdict


def change(before: float, difference: tuple[float, float, float], rows: int = 100) -> LossChange:
    value, low, high = difference
    return LossChange(
        before=Interval(before, before - 0.1, before + 0.1),
        after=Interval(before + value, before + value - 0.1, before + value + 0.1),
        difference=Interval(value, low, high),
        relative=Interval(value / before, low / before, high / before),
        rows=rows,
        tokens=rows * 20,
    )


def comparison(loss: LossChange, gained: int = 0, lost: int = 0) -> Comparison:
    match = None
    if gained or lost:
        before = share_of([True] * lost + [False] * (100 - lost))
        after = share_of([True] * gained + [False] * (100 - gained))
        match = ShareChange(before, after, gained, lost, mcnemar(gained, lost))
    return Comparison("base", "adapter", loss, match, (), (), ())


BETTER = change(2.31, (-1.29, -1.35, -1.22))
SAME_MEMORY = Forgetting("text", change(2.0, (0.016, -0.01, 0.04)))


def test_better_and_nothing_forgotten_passes_with_the_figures() -> None:
    found = verdict(comparison(BETTER), SAME_MEMORY)
    assert found.outcome == "PASS"
    assert found.text == (
        "Held-out loss 2.31 -> 1.02 (-1.29, 95 % interval -1.35 to -1.22); known text +0.8 %: "
        "better, and nothing forgotten beyond noise."
    )


def test_without_known_text_it_says_so() -> None:
    found = verdict(comparison(BETTER))
    assert found.outcome == "PASS"
    assert found.text.endswith("better. Forgetting was not measured.")


@pytest.mark.parametrize(
    ("rise", "outcome", "words"),
    [
        ((0.5, 0.4, 0.6), "FAIL", "but too much forgotten (margin 10 %)"),
        ((0.2, 0.1, 0.3), "INSUFFICIENT", "but forgetting is unclear (+5.0 to +15.0 %, margin 10 %)"),
        ((0.06, 0.02, 0.1), "PASS", "and little forgotten (margin 10 %)"),
        ((-0.02, -0.05, 0.01), "PASS", "and nothing forgotten beyond noise"),
    ],
)
def test_known_text_is_judged_by_its_margin(
    rise: tuple[float, float, float], outcome: str, words: str
) -> None:
    found = verdict(comparison(BETTER), Forgetting("text", change(2.0, rise)), margin=0.10)
    assert found.outcome == outcome
    assert words in found.text


def test_without_a_margin_forgetting_is_told_and_not_judged() -> None:
    found = verdict(comparison(BETTER), Forgetting("text", change(2.0, (0.5, 0.4, 0.6))))
    assert found.outcome == "PASS"
    assert "known text +25.0 %" in found.text
    assert "some of what the base knew is forgotten" in found.text
    worse = verdict(comparison(BETTER), Forgetting("text", change(2.0, (0.9, 0.8, 1.0))))
    assert "much of what the base knew is forgotten" in worse.text


@pytest.mark.parametrize(
    ("difference", "outcome", "words"),
    [
        ((0.3, 0.2, 0.4), "FAIL", "worse"),
        ((0.001, -0.004, 0.006), "FAIL", "no better"),
        (
            (-0.1, -0.3, 0.1),
            "INSUFFICIENT",
            "no clear difference (about 450 rows would show one this size), and nothing",
        ),
        ((0.0, -0.3, 0.3), "INSUFFICIENT", "no clear difference"),
    ],
)
def test_the_task_is_judged_by_its_whole_interval(
    difference: tuple[float, float, float], outcome: str, words: str
) -> None:
    found = verdict(comparison(change(2.0, difference)), SAME_MEMORY)
    assert found.outcome == outcome
    assert words in found.text


def test_worse_answers_fail_even_with_a_lower_loss() -> None:
    found = verdict(comparison(BETTER, gained=2, lost=20))
    assert found.outcome == "FAIL"
    assert "worse answers (2 gained, 20 lost, p = 0.00012)" in found.text
    assert "exact match 20 % -> 2 %" in found.text


def test_few_rows_are_never_enough() -> None:
    found = verdict(comparison(change(2.0, (-1.0, -1.1, -0.9), rows=9)))
    assert found.outcome == "INSUFFICIENT"
    assert "9 rows are too few to judge (at least 10)" in found.text
    few = Forgetting("text", change(2.0, (0.0, -0.01, 0.01), rows=3))
    assert verdict(comparison(BETTER), few, margin=0.1).outcome == "INSUFFICIENT"


def test_failing_outweighs_not_knowing() -> None:
    unclear = comparison(change(2.0, (-0.1, -0.3, 0.1)))
    forgot = Forgetting("text", change(2.0, (0.5, 0.4, 0.6)))
    assert verdict(unclear, forgot, margin=0.1).outcome == "FAIL"
