from __future__ import annotations

import random
from dataclasses import replace

import pytest

from graftlm.core.errors import DataError
from graftlm.evaluation.compare import compare, forgetting
from graftlm.evaluation.metrics import mcnemar
from graftlm.evaluation.runner import EvaluatedRow, Evaluation


def evaluation(name: str, losses: list[float], answers: list[str] | None = None) -> Evaluation:
    """Rows of ten tokens with these losses per token; references are "yes"."""
    rows = []
    for number, loss in enumerate(losses, start=1):
        texts = {}
        if answers is not None:
            texts = {"prompt": f"question {number}", "prediction": answers[number - 1], "reference": "yes"}
        rows.append(EvaluatedRow(number, f"{number:x}", loss * 10, 10, **texts))
    return Evaluation(name, tuple(rows), 1.0, True, "head in chunks")


def test_losses_are_paired_by_row() -> None:
    chance = random.Random(0)
    before = [chance.uniform(1, 4) for _ in range(60)]
    found = compare(evaluation("base", before), evaluation("adapter", [loss - 0.5 for loss in before]))
    assert found.loss.difference.value == pytest.approx(-0.5)
    assert found.loss.difference.high - found.loss.difference.low < 1e-9
    assert found.exact_match is None
    assert (found.before, found.after) == ("base", "adapter")


def test_answers_are_counted_and_tested() -> None:
    old = ["yes"] * 3 + ["no"] * 9
    new = ["no"] * 1 + ["yes"] * 9 + ["no"] * 2
    match = compare(evaluation("a", [1.0] * 12, old), evaluation("b", [1.0] * 12, new)).exact_match
    assert match is not None
    assert (match.before.correct, match.after.correct, match.gained, match.lost) == (3, 9, 7, 1)
    assert match.p_value == mcnemar(7, 1)


def test_samples_are_the_extremes_and_never_shown_twice() -> None:
    before = [2.0] * 20
    after = [2.0 + (number - 14) / 10 for number in range(20)]
    found = compare(evaluation("a", before, ["no"] * 20), evaluation("b", after, ["yes"] * 20))
    assert [sample.row for sample in found.gains] == [1, 2, 3]
    assert [sample.row for sample in found.losses] == [20, 19, 18]
    assert found.gains[0].change == pytest.approx(-1.4)
    shown = [sample.row for sample in (*found.gains, *found.losses, *found.others)]
    assert len(set(shown)) == 9
    assert (
        found.others
        == compare(evaluation("a", before, ["no"] * 20), evaluation("b", after, ["yes"] * 20)).others
    )


def test_wrong_answers_come_before_losses_that_rose() -> None:
    answers = ["yes"] * 12
    answers[5] = "no"
    after = [1.0 + number / 10 for number in range(12)]
    found = compare(evaluation("a", [2.0] * 12, ["no"] * 12), evaluation("b", after, answers))
    assert [sample.row for sample in found.losses] == [6, 12, 11]


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_few_rows_are_shared_out(rows: int) -> None:
    found = compare(evaluation("a", [2.0] * rows), evaluation("b", [1.0] * rows))
    shown = [sample.row for sample in (*found.gains, *found.losses, *found.others)]
    assert len(set(shown)) == len(shown) == min(rows, 3)


def test_different_rows_are_refused() -> None:
    one = evaluation("base", [1.0, 2.0, 3.0])
    other_text = replace(one, rows=(*one.rows[:2], replace(one.rows[2], digest="ff")))
    with pytest.raises(DataError, match="different rows") as caught:
        compare(one, other_text)
    assert caught.value.problems == ("row 3: 3 before, row 3: ff after",)
    with pytest.raises(DataError, match="3 and 2 rows"):
        compare(one, replace(one, rows=one.rows[:2]))
    with pytest.raises(DataError, match="different rows"):
        forgetting(one, replace(one, rows=one.rows[::-1]), source="text")


def test_incomplete_evaluations_are_refused() -> None:
    one = evaluation("base", [1.0, 2.0])
    with pytest.raises(DataError, match="'adapter' is not complete"):
        compare(one, replace(one, name="adapter", complete=False))


def test_forgetting_is_relative() -> None:
    found = forgetting(evaluation("a", [2.0] * 30), evaluation("b", [2.2] * 30), source="ten novels")
    assert found.loss.relative.value == pytest.approx(0.1)
    assert found.source == "ten novels"
