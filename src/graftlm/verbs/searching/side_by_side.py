"""Several trials from one rung to the next at the same time, over one base (`training.stacked`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from graftlm.core.errors import GraftError
from graftlm.core.files import remove_stale
from graftlm.core.notices import notice
from graftlm.core.progress import progress
from graftlm.core.seeding import seed_everything
from graftlm.formats.layout import CONFIG
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.generate import Progress
from graftlm.models.heads import head_modules
from graftlm.models.recompute.policy import Policy
from graftlm.objectives.together import TogetherObjective
from graftlm.quant.facts import device_of
from graftlm.tasks.base import Task
from graftlm.training.loop import TrainResult
from graftlm.training.recipe import Recipe
from graftlm.training.stacked import train_together
from graftlm.training.stacked_member import Member
from graftlm.training.stacking_choice import StackingChoice, obstacle, worth_stacking
from graftlm.verbs.learner import attach_learner
from graftlm.verbs.searching.leg import (
    Course,
    Entry,
    Leg,
    StopAt,
    evaluation_of,
    identity_of,
    is_whole,
    leg_of,
    resume_of,
    total_steps,
)
from graftlm.verbs.start import attach_started


def legs(course: Course, entries: Sequence[Entry]) -> list[Leg | GraftError]:
    """The leg of every trial, or what it failed by; those that can share passes train together."""
    found: dict[int, Leg | GraftError] = {}
    for stack in _stacks(course, entries):
        if len(stack) > 1:
            try:
                shared = together(course, [entries[index] for index in stack])
            except GraftError as error:
                notice(f"Trials go on one after the other: {error.seen}")
            else:
                found |= dict(zip(stack, shared, strict=True))
                continue
        found |= {index: _alone(course, entries[index]) for index in stack}
    return [found[index] for index in range(len(entries))]


def most_together(course: Course, recipe: Recipe, trials: int, plan: Path) -> tuple[StackingChoice, Policy]:
    """How many trials of a search should train at a time, by the recipe that all start from, and what they
    compute again in backward."""
    task, model = course.bench.task(recipe), course.bench.model(recipe)
    learner = attach_learner(task, model, course.bench.tokenizer, task.recipe, plan)
    try:
        memory = learner.setup.recompute
        why = obstacle(model, learner.objective, task.method(model))
        if why is not None:
            return StackingChoice(1, why), memory.policy
        choice = worth_stacking(
            [learner.batches.most_tokens] * trials,
            device=device_of(model),
            policy=memory.policy,
            activation_bytes=memory.activation_bytes,
            free_bytes=memory.free_bytes,
        )
        return choice, memory.policy
    finally:
        learner.adapters.detach()


def _alone(course: Course, entry: Entry) -> Leg | GraftError:
    try:
        return course.alone(entry)
    except GraftError as error:
        return error


def _stacks(course: Course, entries: Sequence[Entry]) -> Iterator[list[int]]:
    """Indices of the entries that train together: over the same base, by methods that can. DoRA slows its
    layers down for everybody, and stays among itself."""
    by_base: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        by_base.setdefault(entry.recipe.model.model_dump_json(), []).append(index)
    for indices in by_base.values():
        if len(entries) == 1:
            yield indices
            continue
        stacks: dict[str, list[int]] = {}
        for index in indices:
            recipe = entries[index].recipe
            model, task = course.bench.model(recipe), course.bench.task(recipe)
            config = task.method(model)
            why = obstacle(model, task.objective(model), config)
            kind = "dora" if getattr(config, "use_dora", False) else "plain"
            stacks.setdefault(f"alone {index}" if why else kind, []).append(index)
        yield from stacks.values()


def together(course: Course, entries: Sequence[Entry]) -> list[Leg | GraftError]:
    """Go on with several trials side by side; who fails gives its error in place of its leg.

    Raises:
        GraftError: what concerns all of them; KeyboardInterrupt: as of `alone`.
    """
    model = course.bench.model(entries[0].recipe)
    tasks = [course.bench.task(entry.recipe) for entry in entries]
    names = [f"trial-{entry.folder.path.name}" for entry in entries]
    adapters: AdapterSet | None = None
    try:
        with progress(f"{len(entries)} trials together") as tick:
            ticks = Shares(tick)
            members, totals = list[Member[Any]](), list[int]()
            for entry, task, name in zip(entries, tasks, names, strict=True):
                seed_everything(task.recipe.train.seed)
                batches = task.batches(course.bench.tokenizer)
                adapters = attach_started(model, task.method(model), name, batches)
                entry.folder.write_recipe(task.recipe)
                totals.append(total_steps(task, batches))
                member = _member(course, entry, task, name, adapters, totals[-1], ticks)
                members.append(member)
            assert adapters is not None
            objective = cast(TogetherObjective[Any], tasks[0].objective(model))  # see `_stacks`
            found = train_together(
                model, adapters, objective, members, policy=course.policy, stop=course.stop
            )
        course.halt()
        ended = zip(entries, tasks, names, totals, strict=True)
        return [
            _end(course, entry, task, adapters, name, total, found[name])
            for entry, task, name, total in ended
        ]
    finally:
        if adapters is not None:
            adapters.detach()


def _member(
    course: Course, entry: Entry, task: Task[Any], name: str, adapters: AdapterSet, total: int, ticks: Shares
) -> Member[Any]:
    model, run, step = adapters.model, entry.folder.path, entry.until(total)
    remove_stale(run)
    stop = StopAt(course.stop, step if step < total else math.inf, ticks.of(name, step))
    parameters = adapters.named_parameters(name)
    own, heads = task.method(model).rate_scale, tuple(f"{path}." for path in head_modules(model))
    return Member(
        name,
        task.batches(course.bench.tokenizer),
        parameters,
        task.recipe.train,
        run,
        resume=resume_of(run),
        identity=identity_of(task.recipe, model),
        evaluate=evaluation_of(task, model),
        callbacks=[stop.hear],
        lora_b=[f"{path}.{key}" for path, part in adapters.parts(name).items() for key in part.output_side],
        scales={key: 1 / own for key in parameters if own != 1 and key.startswith(heads)},
        stop=stop,
    )


def _end(
    course: Course,
    entry: Entry,
    task: Task[Any],
    adapters: AdapterSet,
    name: str,
    total: int,
    result: TrainResult | GraftError,
) -> Leg | GraftError:
    if isinstance(result, GraftError):
        return result
    folder = entry.folder
    with adapters.activated(name):
        found = course.bench.measure(task, course.metric, f"trial {folder.path.name}", course.halt)
    remove_stale(folder.adapter)
    if is_whole(result, total) and not (folder.adapter / CONFIG).is_file():
        adapters.save(folder.adapter, name)
    trainable = sum(parameter.numel() for parameter in adapters.parameters(name))
    return leg_of(folder, result, total, found, trainable, 0)


class Shares:
    """One bar for several trials: the steps of all of them."""

    def __init__(self, tick: Progress) -> None:
        self._tick = tick
        self._done: dict[str, int] = {}
        self._until: dict[str, int] = {}

    def of(self, name: str, until: int) -> Callable[[int], None]:
        """What one of them calls with its step."""
        self._until[name] = until

        def said(step: int) -> None:
            self._done[name] = step
            self._tick(sum(self._done.values()), sum(self._until.values()))

        return said
