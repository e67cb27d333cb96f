"""`graft plan`: which recipe suits data, base, machine and wishes, and what it will take. Starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.core.errors import UsageError
from graftlm.core.files import write_atomic
from graftlm.core.progress import progress
from graftlm.models.base_kind import kind_of
from graftlm.planning.base_facts import BaseFacts, base_facts
from graftlm.planning.choice import choose
from graftlm.planning.corrected import corrected_estimators
from graftlm.planning.durations import parse_seconds
from graftlm.planning.hardware import described, read_machine, this_machine
from graftlm.planning.history import Record, correction, kind_of_run, read_records
from graftlm.planning.machine import Machine
from graftlm.planning.option import Choice
from graftlm.planning.picture import require_ending, write_picture
from graftlm.planning.requirements import Requirements
from graftlm.planning.written import recipe_text
from graftlm.tasks.table import task_of
from graftlm.training.recipe import Recipe
from graftlm.verbs.calibrate import calibrated
from graftlm.verbs.outputs import require_new_output
from graftlm.verbs.plan_report import PlanReport
from graftlm.verbs.row_lengths import row_lengths
from graftlm.verbs.run_folder import Request


def plan(
    source: str | Path,
    *,
    model: str | None = None,
    method: str | None = None,
    task: str | None = None,
    overrides: Sequence[str] = (),
    deadline: str | float | None = None,
    budget: float | None = None,
    latency_critical: bool = False,
    tasks: int = 1,
    quality_first: bool = False,
    gpu: str | None = None,
    gpu_memory: str | None = None,
    machine: Path | None = None,
    price_per_hour: float | None = None,
    recipe_file: Path | None = None,
    picture_file: Path | None = None,
    calibrate: bool = False,
) -> PlanReport:
    """Predict every way to run a recipe, and rank them.

    Args:
        source, model, method, task, overrides: as for `tune`; what is given stays, the rest is chosen.
        deadline: the whole run has to be over by then: seconds, or `2h`, `1h30m`.
        budget: the whole run may cost so much, at `price_per_hour`.
        latency_critical: nothing may be added to the time of an answer.
        tasks: how many tasks are to share the base, each with its adapter.
        quality_first: take what promises the best result among all that fits.
        gpu, gpu_memory: a described machine, such as `rtx4090` or `24GB`; without them it is this one.
        machine: a YAML file that describes one.
        price_per_hour: of the machine, in any currency; wins over that of the file.
        recipe_file: a new file for the best recipe, which `tune` takes as it is.
        calibrate: load the base and take some real micro-batches of the first option, to correct its time.
        picture_file: a new .svg, .html or .png with the memory of the options.

    Raises:
        GraftError: the data, the base or the machine cannot be read, or the request contradicts itself.
    """
    wanted = Requirements(
        None if deadline is None else parse_seconds(deadline), budget, latency_critical, tasks, quality_first
    )
    options: dict[str, Any] = {"model": {"name": model}, "method": {"type": method}, "task": {"type": task}}
    given = {key: value for key, value in options.items() if None not in value.values()}
    recipe = Request(str(source), given, tuple(overrides), None).recipe()
    for path in filter(None, (recipe_file, picture_file)):
        require_new_output(path)
    if picture_file is not None:
        require_ending(picture_file)
    if machine is None and price_per_hour is None:  # before anything is measured
        _require_price(wanted, None, str(source))
    place = _machine(gpu, gpu_memory, machine, price_per_hour)
    _require_price(wanted, place.price_per_hour, str(source))
    report = _planned(recipe, wanted, place)
    if calibrate:
        report = replace(report, choice=calibrated(report.choice))
    return _written(report, recipe_file, picture_file)


def _written(report: PlanReport, recipe_file: Path | None, picture_file: Path | None) -> PlanReport:
    """The report, once its files are there; none is written where nothing keeps the limits."""
    if recipe_file is not None and report.choice.best is not None:
        write_atomic(recipe_file, recipe_text(report.choice.best.recipe))
        report = replace(report, recipe_file=recipe_file)
    if picture_file is not None and report.choice.best is not None:
        title = f"{report.facts.name} on {report.recipe.data.path}"
        write_picture(picture_file, report.choice, report.shown_options, title)
        report = replace(report, picture_file=picture_file)
    return report


def _planned(recipe: Recipe, wanted: Requirements, machine: Machine) -> PlanReport:
    kind = kind_of(base_facts(recipe.model.name).config)
    task = task_of(recipe, kind)
    task.read()
    facts = base_facts(recipe.model.name, task.ending)
    rows, recipe = row_lengths(task, task.recipe, facts)
    records = read_records()
    with progress("predicting options") as tick:
        choice = choose(
            recipe, wanted, facts, rows, machine, estimators=corrected_estimators(records), progress=tick
        )
    return PlanReport(recipe, task.name, task.why, facts, rows, wanted, _with_history(choice, facts, records))


def _with_history(choice: Choice, facts: BaseFacts, records: Sequence[Record]) -> Choice:
    """The choice with a note on what corrected the figures of its first option."""
    if choice.best is None:
        return choice
    note = correction(records, choice.machine, **kind_of_run(choice.best.recipe, facts)).note
    return replace(choice, notes=(*choice.notes, note)) if note else choice


def _machine(gpu: str | None, memory: str | None, file: Path | None, price: float | None) -> Machine:
    if file is not None and (gpu or memory):
        raise UsageError(
            "The machine is described twice: by a file, and by --gpu or --gpu-memory.",
            fix="Leave one of them out.",
        )
    if file is not None:
        found = read_machine(file)
    else:
        found = described(gpu=gpu, memory=memory) if gpu or memory else this_machine()
    return found if price is None else replace(found, price_per_hour=price)


def _require_price(wanted: Requirements, price: float | None, source: str) -> None:
    if wanted.budget is not None and price is None:
        raise UsageError(
            "A budget is given, and no price.",
            meaning="What a run costs is its time at the machine's price per hour.",
            fix=f"graft plan {shlex.quote(source)} --budget {wanted.budget:g} --price-per-hour PRICE ...",
        )
