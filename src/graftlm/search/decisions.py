"""What is done next in a search, from what is known: pure functions of its trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from graftlm.search.budget import Budget, Spent
from graftlm.search.pareto import Candidate
from graftlm.search.stopping import places, promoted
from graftlm.search.trials import Trial


def candidates(trials: Sequence[Trial], rung: int, costs: Sequence[str]) -> list[Candidate]:
    """The trials that reached a rung, as they were there; `costs` names what counts against them. At their
    end they are judged by what the search is judged by, before by what is surer then."""
    return [
        Candidate(
            trial.number,
            trial.rungs[rung].score if rung == len(trial.steps) - 1 else trial.rungs[rung].early,
            tuple(trial.rungs[rung].costs[name] for name in costs),
        )
        for trial in trials
        if trial.reached > rung and trial.state != "failed"
    ]


def spent(trials: Sequence[Trial]) -> Spent:
    """What all trials have used."""
    rungs = [rung for trial in trials for rung in trial.rungs]
    return Spent(len(trials), sum(rung.seconds for rung in rungs), sum(rung.tokens for rung in rungs))


def next_promotion(
    trials: Sequence[Trial], costs: Sequence[str], *, no_more: bool, others_work: bool
) -> Trial | None:
    """The waiting trial that goes on to its next rung; None where nobody does now.

    Args:
        no_more: no new trial can come.
        others_work: other processes are busy, and this one would wait: then it goes ahead with what is sure.
    """
    for rung in reversed(range(_rungs(trials) - 1)):
        there = candidates(trials, rung, costs)
        gone_on = sum(trial.target > rung for trial in trials if trial.state != "failed")
        coming = any(trial.is_due and trial.target <= rung for trial in trials)
        coming |= any(_will_promote(trials, below) for below in range(rung))
        is_complete = no_more and not coming
        if not there or not (is_complete or others_work):
            continue
        order = promoted(there, gone_on, is_complete=is_complete)
        waiting = {trial.number: trial for trial in trials if trial.is_waiting and trial.target == rung}
        if found := [waiting[one.number] for one in order if one.number in waiting]:
            return found[0]
    return None


def allows_more(trials: Sequence[Trial], budget: Budget) -> bool:
    """Whether a new trial fits, with all that has to be finished after it."""
    used = spent(trials)
    if budget.trials is not None and used.trials >= budget.trials:
        return False
    if not any(trial.rungs for trial in trials):
        return True  # nothing is known of what trials cost
    return budget.allows(used, to_finish(trials, more=1))


def allows_whole(trials: Sequence[Trial], budget: Budget) -> bool:
    """Whether one whole trial fits at all, as far as the first ones tell."""
    if not any(trial.rungs for trial in trials) or any(trial.state == "whole" for trial in trials):
        return True
    return budget.allows(Spent(), whole_trial(trials))


def whole_trial(trials: Sequence[Trial]) -> Spent:
    """What one trial takes from its beginning to its end."""
    seconds = [_cost(trials, rung)[0] for rung in range(_rungs(trials))]
    tokens = [_cost(trials, rung)[1] for rung in range(_rungs(trials))]
    return Spent(1, sum(seconds), math.ceil(sum(tokens)))


def to_finish(trials: Sequence[Trial], more: int = 0) -> Spent:
    """What it takes to bring the search to its end with `more` new trials, by what legs took until now."""
    seconds, tokens, going = 0.0, 0.0, 0
    for rung in range(_rungs(trials)):
        due = sum(trial.is_due and trial.target == rung for trial in trials)
        arrived = sum(trial.reached > rung for trial in trials if trial.state != "failed")
        if rung == 0:
            legs = more + due
            total = arrived + legs
        else:
            legs = max(0, going - arrived)
            total = going
        one_second, one_token = _cost(trials, rung)
        seconds, tokens = seconds + legs * one_second, tokens + legs * one_token
        going = places(total)
    return Spent(more, seconds, math.ceil(tokens))


def others_running(trials: Sequence[Trial], own: Sequence[int]) -> bool:
    """Whether trials are on their way that are not this process's."""
    return any(trial.is_due and trial.number not in own for trial in trials)


def _will_promote(trials: Sequence[Trial], rung: int) -> bool:
    """Whether trials that stand at a rung will still go on from it."""
    there = sum(trial.reached > rung for trial in trials if trial.state != "failed")
    gone_on = sum(trial.target > rung for trial in trials if trial.state != "failed")
    return gone_on < places(there)


def _rungs(trials: Sequence[Trial]) -> int:
    return max((len(trial.steps) for trial in trials), default=1) or 1


def _cost(trials: Sequence[Trial], rung: int) -> tuple[float, float]:
    """Seconds and tokens of a leg to a rung: measured, or from the steps of the first one."""
    found = [trial.rungs[rung] for trial in trials if trial.reached > rung]
    if found:
        return fmean(one.seconds for one in found), fmean(one.tokens for one in found)
    first = [trial for trial in trials if trial.rungs]
    legs = [
        (trial.steps[rung] - trial.steps[rung - 1]) / trial.steps[0]
        for trial in first
        if len(trial.steps) > rung
    ]
    longer = fmean(legs) if legs else 1.0
    base = _cost(trials, 0)
    return base[0] * longer, base[1] * longer
