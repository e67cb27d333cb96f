"""Importance on trials whose causes are known."""

from __future__ import annotations

import random

from graftlm.search.importance import importances


def points(count: int, seed: int) -> list[dict[str, object]]:
    draw = random.Random(seed)
    return [
        {"rate": 10 ** draw.uniform(-4, -2), "rank": draw.choice([4, 8, 16]), "targets": draw.choice("ab")}
        for _ in range(count)
    ]


def test_what_decides_alone_explains_nearly_all_and_the_rest_is_chance() -> None:
    trials = points(40, 1)
    found = {one.name: one for one in importances(trials, [float(str(t["rate"])) for t in trials])}
    assert found["rate"].share > 0.8 and found["rate"].is_clear
    assert max(found["rank"].share, found["targets"].share) < 0.2


def test_a_name_that_decides_is_found() -> None:
    trials = points(40, 2)
    found = importances(trials, [float(t["targets"] == "a") for t in trials])
    assert found[0].name == "targets" and found[0].share > 0.8


def test_chance_is_called_chance() -> None:
    draw = random.Random(0)
    clear = 0
    for seed in range(30):
        trials = points(24, seed)
        clear += sum(one.is_clear for one in importances(trials, [draw.random() for _ in trials]))
    assert clear <= 0.12 * 90, "one in twenty, and room for luck"


def test_few_trials_say_nothing_and_conditions_may_be_missing() -> None:
    assert importances(points(5, 0), [1.0] * 5) == []
    trials = [{"a": n} if n % 2 else {"b": n} for n in range(20)]
    assert {one.trials for one in importances(trials, [float(n) for n in range(20)])} == {10}
