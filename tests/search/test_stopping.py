"""Who goes on: successive halving over one objective and several, on trials whose end is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from graftlm.search.budget import Budget
from graftlm.search.decisions import allows_more, allows_whole, next_promotion, spent, to_finish
from graftlm.search.pareto import Candidate, front
from graftlm.search.scores import Score
from graftlm.search.stopping import order, places, rung_count, rung_steps
from graftlm.search.trials import Rung, Trial

TOTAL = 180
COSTS = ("parameters",)


def simulated(
    qualities: Sequence[float],
    costs: Sequence[float],
    budget: Budget,
    *,
    names: Sequence[str] = COSTS,
    wobble: Callable[[int, int], float] = lambda number, rung: 0.0,
) -> list[Trial]:
    """A whole search in a moment: trial n has quality n at every rung, plus what `wobble` says."""
    steps = rung_steps(TOTAL, rung_count(TOTAL))
    trials: list[Trial] = []
    while True:
        due = next((trial for trial in trials if trial.is_due), None)
        if due is None and len(trials) < len(qualities) and allows_more(trials, budget):
            due = Trial(len(trials), {}, {})
            trials.append(due)
        if due is None:
            found = next_promotion(trials, names, no_more=True, others_work=False)
            if found is None:
                return trials
            due = replace(found, target=found.target + 1)
        rung = due.reached
        before = due.rungs[-1].step if due.rungs else 0
        score = Score(qualities[due.number] + wobble(due.number, rung))
        taken = steps[rung] - before
        cost = {"parameters": costs[due.number]}
        found_here = Rung(steps[rung], score, score, score.value, cost, float(taken), 10 * taken)
        trials[due.number] = replace(due, steps=steps).climbed(found_here)


def whole(trials: Sequence[Trial]) -> set[int]:
    return {trial.number for trial in trials if trial.state == "whole"}


def test_of_24_trials_eight_and_then_three_go_on_and_the_best_is_among_them() -> None:
    draw = random.Random(0)
    qualities = [draw.random() for _ in range(24)]
    trials = simulated(qualities, [1.0] * 24, Budget(trials=24), names=())
    assert [sum(trial.reached > rung for trial in trials) for rung in range(3)] == [24, 8, 3]
    assert whole(trials) == set(sorted(range(24), key=lambda n: qualities[n])[:3])
    assert spent(trials).seconds < 24 * TOTAL / 3, "less than a third of the steps of 24 whole trials"


def test_with_several_objectives_the_ends_of_the_front_are_kept() -> None:
    costs = [2.0 ** (n % 8) for n in range(24)]
    qualities = [10.0 - n % 8 + 0.1 * (n // 8) for n in range(24)]  # dearer is better, three of each cost
    trials = simulated(qualities, costs, Budget(trials=24))
    second = {trial.number for trial in trials if trial.reached > 1}
    assert {7, 0} <= second, "the best and the cheapest"
    assert 7 in whole(trials)


def test_every_second_place_goes_by_quality_alone() -> None:
    cheap = [Candidate(n, Score(9.0 - 0.1 * n), (1.0 + n,)) for n in range(10)]
    good = [Candidate(10 + n, Score(1.0 + 0.1 * n), (1e6,)) for n in range(10)]
    first = [one.number for one in order([*cheap, *good])][:8]
    assert first[0] == 10 and len({n for n in first if n >= 10}) >= 4


def test_a_front_goes_on_whole_where_there_is_room() -> None:
    points = [Candidate(n, Score(5.0 - n), (10.0**n,)) for n in range(4)]
    beaten = [Candidate(10 + n, Score(9.0), (10.0**n,)) for n in range(4)]
    assert {one.number for one in front([*points, *beaten])} == {0, 1, 2, 3}
    assert {one.number for one in order([*points, *beaten])[:5]} >= {0, 1, 2, 3}


@pytest.mark.parametrize("seconds", [TOTAL * 1.2, TOTAL * 3, TOTAL * 10])
def test_a_budget_in_seconds_is_held_and_at_least_one_trial_is_whole(seconds: float) -> None:
    draw = random.Random(1)
    trials = simulated([draw.random() for _ in range(200)], [1.0] * 200, Budget(seconds=seconds), names=())
    assert spent(trials).seconds <= seconds * 1.15
    assert whole(trials)


def test_a_budget_in_tokens_is_held() -> None:
    trials = simulated([0.5] * 100, [1.0] * 100, Budget(tokens=10 * TOTAL * 4), names=())
    assert spent(trials).tokens <= 10 * TOTAL * 4
    assert len(trials) > 8


def test_a_budget_below_one_trial_is_seen_after_its_first_leg() -> None:
    rung = Rung(20, Score(1.0), Score(1.0), 1.0, {}, 20.0, 200)
    trials = [Trial(0, {}, {}, rungs=(rung,), steps=(20, 60, 180))]
    assert not allows_whole(trials, Budget(seconds=100))
    assert allows_whole(trials, Budget(seconds=200))


def test_what_is_left_to_do_is_reckoned_exactly() -> None:
    trials = simulated([float(n) for n in range(9)], [1.0] * 9, Budget(trials=9), names=())
    begun = [replace(trial, rungs=trial.rungs[:1], target=0, state="running") for trial in trials]
    ahead = to_finish(begun)
    assert ahead.seconds == spent(trials).seconds - spent(begun).seconds


@pytest.mark.parametrize(("arrived", "going"), [(1, 1), (2, 2), (5, 2), (24, 8), (25, 9)])
def test_somebody_always_arrives(arrived: int, going: int) -> None:
    assert places(arrived) == going


def test_short_runs_have_no_rungs_before_their_end() -> None:
    assert rung_steps(12, rung_count(12)) == (12,)


def test_a_process_that_would_wait_goes_ahead_with_what_is_sure() -> None:
    steps = rung_steps(TOTAL, 3)
    rungs = [Rung(20, Score(float(n)), Score(float(n)), 1.0, {"parameters": 1.0}, 1.0, 1) for n in range(6)]
    trials = [Trial(n, {}, {}, rungs=(rung,), steps=steps) for n, rung in enumerate(rungs)]
    trials.append(Trial(6, {}, {}))  # another process is at it
    assert next_promotion(trials, COSTS, no_more=True, others_work=False) is None
    found = next_promotion(trials, COSTS, no_more=True, others_work=True)
    assert found is not None and found.number == 0


def test_a_failed_trial_stands_in_nobody_s_way() -> None:
    steps = rung_steps(TOTAL, 3)
    rung = Rung(20, Score(0.0), Score(0.0), 0.0, {"parameters": 1.0}, 1.0, 1)
    trials = [
        Trial(0, {}, {}, rungs=(rung,), steps=steps, target=1, state="failed"),
        Trial(1, {}, {}, rungs=(replace(rung, early=Score(1.0)),), steps=steps),
    ]
    found = next_promotion(trials, COSTS, no_more=True, others_work=False)
    assert found is not None and found.number == 1
