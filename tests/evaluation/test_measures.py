"""Measures before and after: values, intervals that cover, verdicts, labels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from graftlm.core.errors import DataError
from graftlm.evaluation import measure_change
from graftlm.evaluation.compare import compare
from graftlm.evaluation.label_table import Confusion, LabelLine
from graftlm.evaluation.measure_change import measure_changes, measured
from graftlm.evaluation.measure_figures import compared
from graftlm.evaluation.measures import MEASURES, Measure, mean_of
from graftlm.evaluation.metrics import wilson
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.evaluation.verdict import verdict

Figures = Sequence[dict[str, float]]


def evaluation(name: str, figures: Figures, measures: tuple[str, ...]) -> Evaluation:
    """Rows of one target and a loss of 1 with these figures."""
    rows = tuple(
        EvaluatedRow(place, f"{place:x}", 1.0, 1, figures=each) for place, each in enumerate(figures, 1)
    )
    return Evaluation(name, rows, 1.0, True, "", measures)


def flags(right: int, rows: int = 40) -> list[dict[str, float]]:
    return [{"accuracy": float(place < right)} for place in range(rows)]


def changes(before: Figures, after: Figures, *names: str) -> tuple[measure_change.MeasureChange, ...]:
    return measure_changes(evaluation("base", before, names), evaluation("adapter", after, names))


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> str:
    """A measure that is no mean: the standard deviation of a figure."""

    def deviation(rows: Sequence[EvaluatedRow]) -> float:
        return float(np.std([row.figures["x"] for row in rows]))

    known = {**MEASURES, "spread": Measure("spread", "Spread", deviation, "lower", figures=("x",))}
    monkeypatch.setattr(measure_change, "MEASURES", known)
    return "spread"


def test_a_share_of_yes_and_no_has_wilsons_interval() -> None:
    (change,) = changes(flags(10), flags(40), "accuracy")
    assert (change.before.value, change.after.value, change.rows) == (0.25, 1.0, 40)
    assert change.before == wilson(10, 40) and change.after == wilson(40, 40)
    assert change.difference.value == 0.75
    assert 0.55 < change.difference.low < 0.75 < change.difference.high < 0.95


def test_differences_are_paired() -> None:
    """Where every row gains the same, nothing is uncertain about the gain."""
    chance = random.Random(0)
    before = [{"reward_margin": chance.gauss(0, 5)} for _ in range(50)]
    after = [{"reward_margin": row["reward_margin"] + 1} for row in before]
    (change,) = changes(before, after, "reward_margin")
    assert change.difference.high - change.difference.low < 1e-9
    assert change.before.high - change.before.low > 1


def test_rows_without_the_figure_are_left_out() -> None:
    (change,) = changes([*flags(5, 10), {}], [*flags(8, 10), {"accuracy": 1.0}], "accuracy")
    assert change.rows == 10 and change.after.value == 0.8
    assert changes([{}], [{}], "accuracy") == ()


def test_any_function_of_rows_is_resampled(spread: str) -> None:
    chance = random.Random(0)
    before = [{"x": chance.gauss(0, 2)} for _ in range(200)]
    (change,) = changes(before, [{"x": row["x"] / 2} for row in before], spread)
    assert change.difference.value == pytest.approx(-change.before.value / 2)
    assert change.before.low < 2 < change.before.high
    assert change.after.low < 1 < change.after.high


@pytest.mark.slow
@pytest.mark.parametrize("rows", [20, 100])
def test_intervals_of_a_mean_cover(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 samples from a skewed distribution of known mean, about 95 % of the intervals hold it."""
    monkeypatch.setattr(measure_change, "RESAMPLES", 2_000)
    chance = random.Random(rows)
    held = 0
    for _ in range(400):
        sample = [{"kl": chance.expovariate(1.0)} for _ in range(rows)]
        found = measured(evaluation("base", sample, ("kl",)))["kl"]
        held += found.low <= 1.0 <= found.high
    assert held / 400 > (0.88 if rows == 20 else 0.92)


def test_a_draw_on_which_a_measure_is_not_defined_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_both(rows: Sequence[EvaluatedRow]) -> float:
        values = {row.figures["x"] for row in rows}
        return 1.0 if len(values) == 2 else float("nan")

    known = {"both": Measure("both", "Both", needs_both, "higher", figures=("x",))}
    monkeypatch.setattr(measure_change, "MEASURES", known)
    (change,) = changes([{"x": 0.0}, {"x": 1.0}], [{"x": 0.0}, {"x": 1.0}], "both")
    assert (change.after.low, change.after.high) == (1.0, 1.0)
    with pytest.raises(DataError, match="Both is nan on the 1 held-out rows"):
        changes([{"x": 0.0}], [{"x": 0.0}], "both")


def test_an_unknown_measure_is_named() -> None:
    with pytest.raises(DataError, match="'zorp'"):
        changes(flags(1), flags(1), "zorp")


@pytest.mark.parametrize(
    ("name", "before", "after", "outcome", "said"),
    [
        ("accuracy", 10, 38, "PASS", "Accuracy 25.0 % -> 95.0 % (+70.0 points, 95 % interval "),
        ("accuracy", 38, 10, "FAIL", ": worse."),
        ("accuracy", 20, 20, "FAIL", ": no better."),
        ("accuracy", 20, 23, "INSUFFICIENT", "rows would show one this size"),
        ("mse", 38, 10, "PASS", ": better."),
    ],
)
def test_the_first_measure_judges(
    name: str, before: int, after: int, outcome: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {**MEASURES, "mse": Measure("mse", "MSE", mean_of("accuracy"), "lower")}
    monkeypatch.setattr(measure_change, "MEASURES", known)
    old = flags(before)
    # The changed rows are drawn from both sides, so that 20 -> 23 is 8 gained and 5 lost.
    new = flags(after) if after != 23 else [{"accuracy": float(5 <= place < 28)} for place in range(40)]
    judged = verdict(compare(evaluation("base", old, (name,)), evaluation("adapter", new, (name,))))
    assert judged.outcome == outcome
    assert said in judged.text
    assert "Forgetting" not in judged.text


def test_few_rows_are_not_judged() -> None:
    judged = verdict(compare(*(evaluation(name, flags(5, 5), ("accuracy",)) for name in ("base", "adapter"))))
    assert judged.outcome == "INSUFFICIENT" and "5 rows are too few" in judged.text


def test_other_measures_are_told() -> None:
    before = [{"accuracy": 0.0, "kl": 0.0} for _ in range(40)]
    after = [{"accuracy": 1.0, "kl": 0.02} for _ in range(40)]
    names = ("accuracy", "kl")
    found = compare(evaluation("base", before, names), evaluation("adapter", after, names))
    assert ", KL to the base 0 nats -> 0.02 nats: better." in verdict(found).text
    assert list(compared(found)) == ["accuracy", "kl", "loss"]
    assert compared(found)["kl"]["after"] == pytest.approx([0.02, 0.02, 0.02])


def labelled(name: str, pairs: Sequence[tuple[str, str]]) -> Evaluation:
    """Rows with (reference, prediction)."""
    plain = evaluation(name, [{"accuracy": float(a == b)} for a, b in pairs], ("accuracy",))
    rows = tuple(
        replace(row, prompt="text", reference=reference, prediction=prediction)
        for row, (reference, prediction) in zip(plain.rows, pairs, strict=True)
    )
    return replace(plain, rows=rows, labels=("a", "b", "c"))


def test_labels_are_counted_one_by_one() -> None:
    before = labelled("base", [("a", "b"), ("a", "a"), ("b", "a"), ("b", "a"), ("c", "c")])
    after = labelled("adapter", [("a", "a"), ("a", "a"), ("b", "a"), ("b", "b"), ("c", "a")])
    table = compare(before, after).labels
    assert table is not None
    assert table.lines == (
        LabelLine("a", rows=2, found_before=1, found_after=2, predicted=4),
        LabelLine("b", rows=2, found_before=0, found_after=1, predicted=1),
        LabelLine("c", rows=1, found_before=1, found_after=0, predicted=0),
    )
    assert set(table.confused) == {Confusion("b", "a", 1), Confusion("c", "a", 1)}


def test_without_labels_there_is_no_table() -> None:
    plain = evaluation("base", flags(3), ("accuracy",))
    assert compare(plain, plain).labels is None
