"""From wishes, data, base and machine to a ranked list of complete recipes, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from graftlm.core.errors import GraftError
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.candidates import Candidate, candidates, frugal, streamed
from graftlm.planning.cost import cost
from graftlm.planning.fitting import Estimators, Situation, fitted_run
from graftlm.planning.limits import broken_limit
from graftlm.planning.looked import Looked
from graftlm.planning.machine import Machine
from graftlm.planning.option import Choice, Fit, Option
from graftlm.planning.quality import GRADES, STORAGE_CHARGE
from graftlm.planning.reasons import notes, reasons
from graftlm.planning.remedies import turned_down
from graftlm.planning.requirements import Requirements
from graftlm.planning.rows import RowLengths
from graftlm.planning.sites import sites_of
from graftlm.training.recipe import Recipe


def choose(
    recipe: Recipe,
    requirements: Requirements,
    facts: BaseFacts,
    rows: RowLengths,
    machine: Machine,
    *,
    estimators: Estimators | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """Every way to run a recipe that keeps the limits, the best first, and the others with why not.

    What the recipe says stays; what it leaves open is tried in the usual ways. The same arguments give the
    same choice.

    Args:
        recipe: as it was written (`planning.written`), not yet filled in.
        rows: lengths of the data.
        estimators: where predictions come from, if not from the models of memory and time alone.
        progress: called with methods looked at and methods in all.

    Raises:
        ConfigError: the recipe does not fit the base: a length beyond its context, for instance.
    """
    situation = Situation(facts, rows, machine, requirements, estimators or Estimators())
    rows.effective(recipe, facts)  # what is wrong with the recipe itself is wrong with every candidate
    found: list[Looked] = []
    groups = [group for group in candidates(recipe, requirements, facts, rows) if group]
    for done, group in enumerate(groups):
        progress(done, len(groups))
        found += _looked_at(group, situation)
    if not any(isinstance(each.outcome, Fit) and _is_best_grade(each.candidate) for each in found):
        found += [_looked(each, situation) for each in frugal(recipe, facts)]
    if not any(isinstance(each.outcome, Fit) for each in found):
        found += [_looked(each, situation) for each in streamed(recipe, facts, machine.device)]
    limits = [(each, broken_limit(each, situation)) for each in found]
    kept = sorted((each for each, limit in limits if limit is None), key=lambda each: _rank(each, situation))
    options = tuple(
        Option(
            each.candidate,
            each.run,
            each.trainable,
            cost(each.run.time.seconds, machine),
            reasons(each, kept[0], found, situation),
        )
        for each in kept
    )
    refused = [(each, limit) for each, limit in limits if limit is not None]
    return Choice(options, turned_down(refused, kept, situation), machine, notes(situation))


def _looked_at(group: Sequence[Candidate], situation: Situation) -> Iterator[Looked]:
    """One method. Where the base fits as it is stored, other ways to store it are not needed, but for one of
    the plainest method, to show what less memory costs."""
    for number, candidate in enumerate(group):
        found = _looked(candidate, situation)
        yield found
        if isinstance(found.outcome, Fit) and (number or candidate.standing.charge > 1):
            return


def _is_best_grade(candidate: Candidate) -> bool:
    return candidate.standing.quality.grade == GRADES[0]


def _looked(candidate: Candidate, situation: Situation) -> Looked:
    try:
        sites = sites_of(situation.facts, candidate.recipe.method.config)
        return Looked(candidate, fitted_run(candidate.recipe, situation, sites.trainable), sites.trainable)
    except GraftError as error:  # this method has no place in this base: said of the candidate alone
        return Looked(candidate, error, 0)


def _rank(each: Looked, situation: Situation) -> tuple[float, ...]:
    """Small is good. By grade, and within a grade by time, where a method pays for what plain LoRA on a base
    as it is stored does not have; by the band alone where quality comes first."""
    standing, storage = each.candidate.standing, STORAGE_CHARGE[each.candidate.storage]
    charged = each.run.time.seconds * standing.charge * storage
    if situation.requirements.is_quality_first:
        return (-standing.quality.middle, storage, charged)
    return (GRADES.index(standing.quality.grade), charged)
