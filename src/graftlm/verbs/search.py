"""`graft search`: the settings of a run found by trials, within a budget, on one loaded base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.config import build, read_yaml
from graftlm.core.errors import GraftError, TrainingError, UsageError
from graftlm.core.files import write_atomic
from graftlm.search.budget import Budget
from graftlm.search.study import require_optuna
from graftlm.search.trials import Trial
from graftlm.training.signals import StopRequests
from graftlm.verbs.searching.default_space import default_space
from graftlm.verbs.searching.finish import finish, say_choice
from graftlm.verbs.searching.folder import SearchFolder
from graftlm.verbs.searching.metric import require_known
from graftlm.verbs.searching.report import page
from graftlm.verbs.searching.request import new_folder, sections_of
from graftlm.verbs.searching.result import SearchResult, result_of
from graftlm.verbs.searching.search import Searching
from graftlm.verbs.searching.settings import (
    FILE,
    SearchSettings,
    read_settings,
    require_sound,
    write_settings,
)
from graftlm.verbs.searching.workers import PROCESSES, helpers, require_place


def search(
    source: str | Path,
    *,
    model: str | None = None,
    method: str | None = None,
    task: str | None = None,
    space: str | Path | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    workers: int = 1,
    on: str = PROCESSES,
    **options: Any,
) -> SearchResult:
    """Search the settings of a run, and leave the best recipe with its adapter, proved on rows of their own.

    Args:
        source: a data file, a hub data set, a recipe (.yaml), or with `resume` the folder of a search.
        model, method, task: the recipe's values of those names.
        space: a YAML file or a mapping, `section.field: [values]` or `{low, high, log}`; a usual one without.
        out: the folder of the search; default `searches/<data>-<number>`.
        overrides: `section.field=value` of every trial.
        resume: go on with a search, or join one that other processes work on.
        workers: processes that work on it, this one included.
        on: where the others are: `processes` of this machine, or `ray`.
        options: fields of `SearchSettings`: budget, sampler, metric, costs, stopping, seed.

    Raises:
        GraftError: in three parts. KeyboardInterrupt: somebody asked to stop; the message says how to go on.
    """
    require_place(on, workers)
    if resume:
        folder = SearchFolder(Path(source) if out is None else Path(out))
        given = {"model": model, "method": method, "task": task, "space": space, "set": overrides, **options}
        settings = _go_on(folder, {name: value for name, value in given.items() if value})
    else:
        settings = _settings(source, model, method, task, space, overrides, options)
        folder = _new(settings, Path(out) if out else None)
    with StopRequests() as stop:
        work = Searching(folder, settings, stop)
        try:
            work.prepare()
        except GraftError:
            if not resume:  # the folder is new, and holds nothing yet that anybody could go on with
                shutil.rmtree(folder.path)
            raise
        with helpers(folder.path, workers, on, _help):
            trials = work.run()
        return _finished(work, trials)


def _finished(work: Searching, trials: Sequence[Trial]) -> SearchResult:
    """Choose, measure on the final rows, report.

    Raises:
        TrainingError: no trial was trained to its end.
    """
    if not any(trial.state == "whole" for trial in trials):
        raise TrainingError(
            f"None of {len(trials)} trials was trained to its end.",
            problems=[f"trial {trial.number}: {trial.why}" for trial in trials if trial.why][:10],
            meaning="All of them failed.",
            fix="Look at the reasons above; try one of them alone: graft tune ... --set ...",
        )
    folder = work.folder
    with folder.deciding:
        found = finish(work, trials)
        say_choice(work, found)
        result = result_of(work, found)
        write_atomic(folder.report, page(work, found, result))
        write_atomic(folder.result, json.dumps(result.as_dict(), indent=1, ensure_ascii=False) + "\n")
    return result


def _help(folder: str) -> None:
    """What a helper on another machine does."""
    search(folder, resume=True)


def _go_on(folder: SearchFolder, given: Mapping[str, Any]) -> SearchSettings:
    """The settings of a search that was begun; its budget may be changed, what it compares may not.

    Raises:
        CheckpointError: there is no search; UsageError: other options are given.
    """
    settings = read_settings(folder.path)
    if others := [name for name in given if name != "budget"]:
        raise UsageError(
            f"A search goes on with its own settings: {', '.join(others)} cannot be given.",
            meaning="Trials of one search must be comparable.",
            fix="Leave these options out (a new --budget is possible), or start a new search.",
        )
    if "budget" in given:
        settings = settings.replace(budget=given["budget"])
        Budget.parse(settings.budget)
        write_settings(folder.path, settings)
    return settings


def _settings(
    source: str | Path,
    model: str | None,
    method: str | None,
    task: str | None,
    space: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str],
    options: Mapping[str, Any],
) -> SearchSettings:
    given = {
        name: {key: value}
        for name, key, value in (("model", "name", model), ("method", "type", method), ("task", "type", task))
        if value is not None
    }
    sections = sections_of(str(source), given, overrides)
    if "name" not in sections.get("model", {}):
        raise UsageError(
            "No base is named.",
            meaning="An adapter is trained for one base model.",
            fix=f"graft search {source} --model M (folder, hub id, or sprout: embedded)",
        )
    wanted = {key: value for key, value in options.items() if value is not None}
    if wanted.get("ladder"):
        _require_free_ladder(sections, space)
        content: dict[str, Any] = {}
    elif isinstance(space, str | Path):
        content = read_yaml(Path(space))
    else:
        content = default_space(sections) if space is None else dict(space)
    settings = build(SearchSettings, {"recipe": sections, "space": content, **wanted}, source="The command")
    Budget.parse(settings.budget)
    require_known(settings.metric)
    if not settings.ladder:
        require_optuna()
        require_sound(settings)
    return settings


def _require_free_ladder(sections: Mapping[str, Any], space: object) -> None:
    """Refuse what the ladder decides itself."""
    if space is not None or "method" in sections:
        given = "a space" if space is not None else "a method"
        raise UsageError(
            f"A ladder was asked for, and {given} as well.",
            meaning="The ladder tries its own methods, the smallest first.",
            fix=f"Leave out {given}, or --ladder.",
        )


def _new(settings: SearchSettings, out: Path | None) -> SearchFolder:
    if out is not None and (out / FILE).is_file():
        raise UsageError(
            f"{out} already holds a search.",
            meaning="Starting again here would mix two searches.",
            fix=f"Go on with it: graft search {out} --resume. Or choose another folder with --out.",
        )
    folder = new_folder(out, settings.recipe)
    write_settings(folder.path, settings)
    return folder
