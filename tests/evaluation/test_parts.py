"""Evaluations of several tasks as one, and back; each task judged as alone, the worst one deciding."""

from __future__ import annotations

import random

import pytest

from graftlm.evaluation.compare import compare
from graftlm.evaluation.joint_verdict import joint_verdict
from graftlm.evaluation.measure_change import measure_changes, measure_of
from graftlm.evaluation.parts import joined, parted
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.evaluation.verdict import verdict


def labels(share: float, name: str = "base") -> Evaluation:
    """A hundred rows of which so many are right."""
    rows = [
        EvaluatedRow(n, f"c{n}", 1.0 - share, 1, figures={"accuracy": float(n < 100 * share)})
        for n in range(100)
    ]
    return Evaluation(name, tuple(rows), 1.0, True, "own", ("accuracy",))


def text(loss: float, name: str = "base") -> Evaluation:
    """Sixty rows of unequal length."""
    draw = random.Random(5)
    lengths = [draw.randrange(1, 40) for _ in range(60)]
    rows = [EvaluatedRow(n, f"t{n}", loss * length, length) for n, length in enumerate(lengths)]
    return Evaluation(name, tuple(rows), 2.0, True, "head", ())


def test_there_and_back() -> None:
    parts = {"intent": labels(0.25), "write": text(2.0)}
    whole = joined("base", parts)
    assert whole.measures == ("intent/accuracy", "intent/loss", "write/loss")
    assert Evaluation.from_json(whole.to_json()) == whole
    for name, found in parted(whole).items():
        assert found.rows == parts[name].rows and found.measures == parts[name].measures


def test_each_measure_is_that_of_its_task() -> None:
    before = {"intent": labels(0.25), "write": text(2.0)}
    after = {"intent": labels(0.75), "write": text(1.5)}
    changes = {
        change.name: change for change in measure_changes(joined("base", before), joined("adapter", after))
    }
    assert changes["intent/accuracy"].before.value == 0.25
    assert changes["intent/accuracy"].after.value == 0.75
    assert changes["intent/accuracy"].rows == 100
    alone = measure_changes(before["intent"], after["intent"])[0]
    assert (changes["intent/accuracy"].before, changes["intent/accuracy"].after) == (
        alone.before,
        alone.after,
    )
    assert changes["write/loss"].before.value == pytest.approx(before["write"].loss)
    assert changes["write/loss"].after.value == pytest.approx(after["write"].loss)
    assert changes["write/loss"].rows == 60


@pytest.mark.parametrize(
    ("accuracy", "loss", "outcome"),
    [(0.75, 1.0, "PASS"), (0.05, 1.0, "FAIL"), (0.75, 3.0, "FAIL"), (0.27, 1.0, "INSUFFICIENT")],
)
def test_the_worst_task_decides(accuracy: float, loss: float, outcome: str) -> None:
    before = {"intent": labels(0.25), "write": text(2.0)}
    after = {"intent": labels(accuracy, "adapter"), "write": text(loss, "adapter")}
    judged = joint_verdict(joined("base", before), joined("adapter", after))
    assert judged.outcome == outcome
    for name in before:
        assert f"{name}: {verdict(compare(before[name], after[name])).text}" in judged.text


def test_titles() -> None:
    assert measure_of("a/accuracy").title == "a: accuracy"
    assert measure_of("a/kl").title == "a: KL to the base"
    assert measure_of("a/loss").unit == "nats"
