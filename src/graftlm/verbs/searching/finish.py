"""The end of a search: the front, what is chosen and why, and its figure on rows kept for that."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftlm.core.files import write_atomic
from graftlm.core.progress import say
from graftlm.evaluation.runner import Evaluation
from graftlm.formats.layout import FOLDER as STORAGE
from graftlm.methods.attach import attach_folder
from graftlm.search.decisions import candidates
from graftlm.search.importance import Importance, importances
from graftlm.search.ladder import STEPS
from graftlm.search.pareto import Candidate, front, knee, smallest_equal
from graftlm.search.scores import best, is_equal
from graftlm.search.trials import Trial
from graftlm.training.recipe import Recipe
from graftlm.verbs.base import stored_recipe
from graftlm.verbs.references import ADAPTER, RECIPE
from graftlm.verbs.searching.metric import Change
from graftlm.verbs.searching.points import climbed
from graftlm.verbs.searching.search import Searching


@dataclass(frozen=True)
class Final:
    """One trial on the final rows, against the base."""

    number: int
    change: Change


@dataclass(frozen=True)
class Outcome:
    """What a finished search says."""

    trials: tuple[Trial, ...]
    whole: tuple[Candidate, ...]
    """Trained to their end, on the rows to select by."""
    front: tuple[Candidate, ...]
    best: int
    knee: int | None
    chosen: int
    equal: tuple[int, ...]
    """Those of the whole trials that rows do not tell from the best."""
    finals: tuple[Final, ...]
    """Of the chosen one, the best and the knee; each once."""
    importance: tuple[Importance, ...]

    def trial(self, number: int) -> Trial:
        """By its number."""
        return next(trial for trial in self.trials if trial.number == number)

    @property
    def final(self) -> Final:
        """Of the chosen one."""
        return next(one for one in self.finals if one.number == self.chosen)


def finish(search: Searching, trials: Sequence[Trial]) -> Outcome:
    """Choose, measure on the final rows, and leave the chosen recipe and adapter in the search folder.

    Raises:
        KeyboardInterrupt: the search was asked to stop; it can go on.
    """
    ended = [trial for trial in trials if trial.state == "whole"]
    whole = [one for trial in ended for one in candidates([trial], trial.reached - 1, search.settings.costs)]
    leader = whole[best([one.score for one in whole])]
    points = front(whole)
    bend = knee(points)
    chosen = _held(trials, whole) if search.settings.ladder else smallest_equal(whole)
    equal = tuple(one.number for one in whole if is_equal(one.score, leader.score))
    named = dict.fromkeys([chosen.number, leader.number, *([bend.number] if bend else [])])
    finals = tuple(_final(search, number) for number in named)
    folder = search.folder
    run = folder.trial(chosen.number).path
    shutil.copytree(run / ADAPTER, folder.path / ADAPTER, dirs_exist_ok=True)
    write_atomic(folder.path / RECIPE, (run / RECIPE).read_bytes())
    return Outcome(
        trials=tuple(trials),
        whole=tuple(whole),
        front=tuple(points),
        best=leader.number,
        knee=bend.number if bend else None,
        chosen=chosen.number,
        equal=equal,
        finals=finals,
        importance=tuple(_importance(trials)),
    )


def _held(trials: Sequence[Trial], whole: Sequence[Candidate]) -> Candidate:
    """The highest step of a ladder that was proved better than the one that held before."""
    holder = climbed(trials).holder
    return next(one for one in whole if one.number == holder)


def _final(search: Searching, number: int) -> Final:
    recipe = stored_recipe(search.folder.trial(number).path)
    base = _measured(search, recipe, None)
    return Final(number, search.metric.change(base, _measured(search, recipe, number)))


def _measured(search: Searching, recipe: Recipe, number: int | None) -> Evaluation:
    """The base, or a trial's adapter, on the final rows; measured once and kept."""
    folder = search.folder
    stored = "" if recipe.model.quantization == "none" else f"-{recipe.model.quantization}"
    name = f"base{stored}-final" if number is None else f"trial-{number:03d}-final"
    known = folder.kept_evaluation(name)
    if known is not None:
        return known
    model = search.bench.model(recipe)
    task = search.bench.held_out(recipe, folder.data / "final.jsonl")
    adapters = None
    if number is not None:
        adapters = attach_folder(model, folder.trial(number).adapter, "default", storage=STORAGE)
    try:
        found = search.bench.measure(task, search.metric.name, name, search.halt)
    finally:
        if adapters is not None:
            adapters.detach()
    folder.keep_evaluation(name, found)
    return found


def _importance(trials: Sequence[Trial]) -> list[Importance]:
    """By the first rung, which nearly all trials reached after the same share of their steps."""
    known = [trial for trial in trials if trial.rungs and trial.state != "failed"]
    points: list[Mapping[str, object]] = [dict(trial.point) for trial in known]
    return importances(points, [one.score.value for one in candidates(known, 0, ())])


def say_choice(search: Searching, found: Outcome) -> None:
    """The sentence behind the choice."""
    say(f"Chosen {chosen_text(search, found)}")


def chosen_text(search: Searching, found: Outcome) -> str:
    """Which trial, and why it rather than the one with the best figure."""
    name = f"trial {found.chosen}"
    if search.settings.ladder:
        return f"{STEPS[found.chosen].name}; {climbed(found.trials).why}"
    if found.chosen == found.best:
        others = len(found.equal) - 1
        told = "1 other is" if others == 1 else f"{others} others are"
        beside = f"; {told} equal within noise and not cheaper" if others else ""
        return f"{name}: the best on the rows to select by{beside}"
    costs = search.settings.costs
    mine, theirs = (
        next(one for one in found.whole if one.number == number) for number in (found.chosen, found.best)
    )
    less = f"{theirs.costs[0] / mine.costs[0]:.1f} times less {costs[0]}" if costs and mine.costs[0] else ""
    return f"{name}: equal within noise to the best, trial {found.best}, with {less or 'no more cost'}"
