"""The search's memory of points, in Optuna's storage, and the samplers that propose the next one.

Several processes, also of several machines, work on one study through a journal file in the search folder.
`optuna-dashboard` reads it. The points that Optuna chooses depend on the seed, the number of the trial and
what is known when it begins, on nothing else: a search that was killed goes on as it would have.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from graftlm.core.errors import CheckpointError, MissingDependency
from graftlm.core.seeding import derived_seed
from graftlm.search.journal import JournalLock, drop_torn_line
from graftlm.search.space import Parameter, Point, Space, Values

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

Sampler = Literal["tpe", "random", "grid", "nsga2"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
JOURNAL, NAME = "study.journal", "graft"
RETRIES = 50
"""Proposals after which a point that was tried already is taken for a sign that the space is used up."""


@dataclass(frozen=True)
class Known:
    """A point that was tried; `values` as far as they are known, all lower is better."""

    point: Point
    values: tuple[float, ...] | None
    memory: Mapping[str, Any] = field(default_factory=dict)
    """What the sampler noted of it when it proposed it: the generation of a genetic one."""


class Study:
    """The journal of one search. Its owner sees to it that one process at a time changes it."""

    def __init__(self, folder: Path, objectives: int) -> None:
        optuna = _optuna()
        path = folder / JOURNAL
        drop_torn_line(path)
        with _quiet():
            backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=JournalLock(path))
            storage = optuna.storages.JournalStorage(backend)
            try:
                self._study: OptunaStudy = optuna.create_study(
                    storage=storage,
                    study_name=NAME,
                    directions=["minimize"] * objectives,
                    load_if_exists=True,
                )
            except ValueError as error:
                raise CheckpointError(
                    f"{path} cannot be read: {error}.",
                    meaning="The journal of the search was edited or damaged.",
                    fix="Restore it, or start a new search.",
                ) from None

    def begin(self, point: Point, space: Space) -> int:
        """Note a new trial; gives its number."""
        optuna = _optuna()
        active = space.active(point)
        with _quiet():
            frozen = optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params={one.name: _stored(one, point[one.name]) for one in active},
                distributions={one.name: _distribution(one) for one in active},
            )
            self._study.add_trial(frozen)
        return len(self._study.get_trials(deepcopy=False)) - 1

    def end(self, number: int, values: Sequence[float] | None, *, is_whole: bool) -> None:
        """Note how a trial ended: whole, stopped early, or (no values) failed; only the first time counts."""
        optuna = _optuna()
        states = optuna.trial.TrialState
        if self._trials[number].state != states.RUNNING:
            return
        with _quiet():
            if is_whole and values is not None:
                self._study.tell(number, values=list(values))
            else:
                self._study.tell(number, state=states.FAIL if values is None else states.PRUNED)

    def points(self, space: Space) -> list[Point]:
        """The points of all trials, by number."""
        return [_point(trial, space) for trial in self._trials]

    @property
    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


def propose(
    space: Space, known: Sequence[Known], *, sampler: Sampler, seed: int, objectives: int, trials: int
) -> Known | None:
    """The next point to try, without values; None where the space has no more.

    Args:
        known: every trial so far by number; those still running have no values, and are not proposed again.
        trials: how many there will be about, for what a sampler does at the beginning.
    """
    tried = {_key(one.point) for one in known}
    if space.size <= len(tried):
        return None
    if sampler == "grid":
        return next((Known(point, None) for point in _grid(space, seed) if _key(point) not in tried), None)
    for retry in range(RETRIES):
        own = derived_seed("search", seed, len(known), retry)
        with _quiet():
            found = _sampled(space, known, _sampler(sampler, own % 2**32, trials), objectives)
        if _key(found.point) not in tried:
            return found
    # A nearly used up space of finitely many points: what is left is taken in order.
    rest = space.points() if space.size < float("inf") else iter(())
    return next((Known(point, None) for point in rest if _key(point) not in tried), None)


def _sampled(space: Space, known: Sequence[Known], sampler: BaseSampler, objectives: int) -> Known:
    """What Optuna proposes after these trials, asked of a study in memory."""
    optuna = _optuna()
    states = optuna.trial.TrialState
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    for one in known:
        active = space.active(one.point)
        study.add_trial(
            optuna.trial.create_trial(
                state=states.RUNNING if one.values is None else states.COMPLETE,
                params={each.name: _stored(each, one.point[each.name]) for each in active},
                distributions={each.name: _distribution(each) for each in active},
                values=None if one.values is None else list(one.values),
                system_attrs=dict(one.memory),
            )
        )
    point = _asked(space, study.ask())
    return Known(point, None, study.get_trials(deepcopy=False)[-1].system_attrs)


def _asked(space: Space, trial: Trial) -> Point:
    free = [one for one in space.parameters if one.condition is None]
    point = {one.name: _suggested(trial, one) for one in free}
    for one in space.active(point):
        if one.name not in point:
            point[one.name] = _suggested(trial, one)
    return point


def _suggested(trial: Trial, parameter: Parameter) -> Any:
    name, domain = parameter.name, parameter.domain
    if isinstance(domain, Values):
        if domain.is_ordered:
            return domain.values[trial.suggest_int(name, 0, len(domain.values) - 1)]
        texts = [json.dumps(value) for value in domain.values]
        return domain.values[texts.index(str(trial.suggest_categorical(name, texts)))]
    if domain.is_whole:
        step = int(domain.step or 1)
        return trial.suggest_int(name, int(domain.low), int(domain.high), step=step, log=domain.log)
    found = trial.suggest_float(name, domain.low, domain.high, step=domain.step, log=domain.log)
    return float(f"{found:.4g}") if domain.step is None else found


def _distribution(parameter: Parameter) -> BaseDistribution:
    from optuna import distributions

    domain = parameter.domain
    if isinstance(domain, Values):
        if domain.is_ordered:
            return distributions.IntDistribution(0, len(domain.values) - 1)
        return distributions.CategoricalDistribution([json.dumps(value) for value in domain.values])
    if domain.is_whole:
        step = int(domain.step or 1)
        return distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log, step=step)
    return distributions.FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)


def _stored(parameter: Parameter, value: Any) -> Any:
    """What stands for a value in Optuna: its place where values are ordered, its text where they are not."""
    domain = parameter.domain
    if isinstance(domain, Values):
        return domain.values.index(value) if domain.is_ordered else json.dumps(value)
    # Four digits are kept of a number in a range: at its very ends that may lie a hair outside.
    return min(max(value, domain.low), domain.high)


def _point(trial: FrozenTrial, space: Space) -> Point:
    found = {}
    for one in space.parameters:
        if one.name in trial.params:
            stored = trial.params[one.name]
            if isinstance(one.domain, Values):
                stored = one.domain.values[stored] if one.domain.is_ordered else json.loads(stored)
            found[one.name] = stored
    return found


def _sampler(name: Sampler, seed: int, trials: int) -> BaseSampler:
    from optuna import samplers

    match name:
        case "tpe":
            start = max(4, min(10, trials // 3))
            return samplers.TPESampler(
                seed=seed, n_startup_trials=start, multivariate=True, group=True, constant_liar=True
            )
        case "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, trials // 4)))
        case _:
            return samplers.RandomSampler(seed=seed)


def _grid(space: Space, seed: int) -> Iterator[Point]:
    """Every point of a finite space in an order of the seed: a search that is cut short saw all corners."""
    points = list(space.points())
    yield from sorted(points, key=lambda point: derived_seed("grid", seed, _key(point)))


def _key(point: Point) -> str:
    return json.dumps(dict(point), sort_keys=True)


def require_optuna() -> None:
    """Refuse to begin what needs it.

    Raises:
        MissingDependency: it is not installed.
    """
    _optuna()


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingDependency("optuna", extra="search") from None
    return optuna


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's log lines and its notes on options that may change are no news to who searches."""
    logging = _optuna().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", _optuna().exceptions.ExperimentalWarning)
            yield
    finally:
        logging.set_verbosity(before)
