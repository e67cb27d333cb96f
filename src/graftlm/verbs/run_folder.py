"""The folder of a run: opened new or to go on, always with the complete recipe inside."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.core.config import build, dump_yaml, override, read_yaml
from graftlm.core.errors import CheckpointError, ConfigError, UsageError
from graftlm.core.files import write_atomic
from graftlm.objectives.settings import AUTO
from graftlm.training.recipe import Recipe, load_recipe, long_form, make_recipe
from graftlm.verbs.outputs import next_free, require_new_output
from graftlm.verbs.references import ADAPTER, RECIPE

PLAN, REPORT, REPORT_JSON, ENVIRONMENT = "plan.json", "report.html", "report.json", "environment.json"
RUNS = Path("runs")
SEARCH = "search.json"
"""What the folder of a search holds."""
FREE = ("output.", "train.on_failure")
"""What may be asked for anew when a run goes on: it does not change its numbers."""
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class RunFolder:
    """One folder with fixed names inside; nothing in it names its own place, so it can be moved."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def resume_command(self) -> str:
        """What somebody types to go on with this run."""
        return f"graft tune {shlex.quote(str(self.path))} --resume"

    def write_recipe(self, recipe: Recipe) -> None:
        """The complete, effective recipe."""
        write_atomic(self.path / RECIPE, dump_yaml(recipe))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """One JSON file of the folder."""
        write_atomic(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Request:
    """What somebody asked `tune` for, before it is known whether a run exists already."""

    source: str
    options: Mapping[str, Any]
    """Sections of a recipe that the command line names."""
    overrides: Sequence[str]
    out: Path | None

    def recipe(self) -> Recipe:
        """The recipe of a new run.

        Raises:
            ConfigError: every problem of the recipe at once.
        """
        self._refuse_said_twice()
        if self.is_recipe:
            return load_recipe(Path(self.source), (*_assignments(self.options), *self.overrides))
        if not any(key.partition(".")[0] == "model" for key in (*self.options, *self._overridden)):
            raise ConfigError(
                "No base is named.",
                meaning="An adapter is trained for one base model.",
                fix=f"graft tune {shlex.quote(self.source)} --model M (folder, hub id, or sprout: embedded)",
            )
        return make_recipe(_with_path(self.options, self.source), self.overrides)

    @property
    def is_recipe(self) -> bool:
        """Whether `source` is a recipe, not data."""
        return self.source.endswith(YAML_SUFFIXES)

    @property
    def _overridden(self) -> list[str]:
        return [assignment.partition("=")[0].strip() for assignment in self.overrides]

    def _refuse_said_twice(self) -> None:
        said = {*self.options, *_flat(self.options)}
        said |= set() if self.is_recipe else {"data", "data.path"}
        said |= set() if self.out is None else {"output.dir"}
        if twice := [key for key in self._overridden if key in said]:
            raise ConfigError(
                f"{twice[0]} is given twice: by --set, and by an argument or option of the command.",
                meaning="One of the two would have no effect.",
                fix="Leave one of them out.",
            )


def open_new(request: Request) -> tuple[RunFolder, Recipe]:
    """A new run; nothing is created yet.

    Raises:
        UsageError: the folder holds a run, or anything else, or the request is wrong.
    """
    if (Path(request.source) / RECIPE).is_file():
        raise UsageError(
            f"{request.source} is a run that was started before.",
            meaning="A new run starts from data or from a recipe.",
            fix=f"Go on with it: {RunFolder(Path(request.source)).resume_command}. Or repeat it: "
            f"graft tune {shlex.quote(str(Path(request.source) / RECIPE))} --out DIR",
        )
    recipe = request.recipe()
    chosen = request.out or (Path(recipe.output.dir) if recipe.output.dir else None)
    path = chosen or next_free(RUNS, Path(recipe.data.path).name.split(".")[0] or "run")
    if (path / RECIPE).exists():
        raise UsageError(
            f"{path} already holds a run.",
            meaning="Starting again here would mix two runs.",
            fix=f"Go on with it: {RunFolder(path).resume_command}. Or choose another folder with --out.",
        )
    require_new_output(path)
    return RunFolder(path), recipe


def open_existing(request: Request) -> tuple[RunFolder, Recipe]:
    """A run to go on with: `source` is its folder, or `out` is and `source` is what it was started with.

    Raises:
        CheckpointError: there is no run; ConfigError: the request contradicts the run's recipe.
    """
    _refuse_search(Path(request.source))
    path = _run_to_resume(request)
    if path is None or not (path / RECIPE).is_file():
        raise CheckpointError(
            f"There is no run to resume in {path or request.source}.",
            meaning=f"A run folder holds {RECIPE}, which is written before the first step.",
            fix="Name the folder of the run: graft tune DIR --resume. Without --resume a new run starts.",
        )
    stored = read_yaml(path / RECIPE)
    wanted = dict(stored)
    if request.is_recipe:
        wanted = _merged(wanted, read_yaml(Path(request.source)))
    elif Path(request.source) != path:
        wanted = override(wanted, [f"data.path={json.dumps(request.source)}"])
    wanted = override(wanted, (*_assignments(request.options), *request.overrides))
    recipe = build(Recipe, stored, source=str(path / RECIPE))
    asked_for = wanted.get("task")
    if isinstance(asked_for, Mapping) and asked_for.get("type") == AUTO:  # it was told when the run began
        wanted["task"] = {**asked_for, "type": recipe.task.type}
    asked = build(Recipe, wanted, source="The command")
    _refuse_changes(recipe, asked)
    output = recipe.output.replace(report_to=asked.output.report_to)
    train = recipe.train.replace(on_failure=asked.train.on_failure)
    return RunFolder(path), recipe.model_copy(update={"output": output, "train": train})


def _refuse_search(folder: Path) -> None:
    """The folder of a search holds a recipe and an adapter, and is no run."""
    if (folder / SEARCH).is_file():
        raise UsageError(
            f"{folder} is a search.",
            meaning="It has many runs, one in each folder of its trials.",
            fix=f"Go on with it: graft search {shlex.quote(str(folder))} --resume",
        )


def _run_to_resume(request: Request) -> Path | None:
    """The folder that the request names as the run: its source, `out`, or what its recipe says."""
    source = Path(request.source)
    if (source / RECIPE).is_file():
        if request.out is not None and request.out.resolve() != source.resolve():
            raise UsageError(
                f"Two runs are named: {source} and --out {request.out}.",
                meaning="A run goes on in its own folder.",
                fix=f"Leave --out out: {RunFolder(source).resume_command}",
            )
        return source
    if request.out is None and request.is_recipe and source.is_file():
        named = request.recipe().output.dir
        return Path(named) if named else None
    return request.out


def _refuse_changes(stored: Recipe, wanted: Recipe) -> None:
    ours, theirs = _flat(stored.model_dump(mode="json")), _flat(wanted.model_dump(mode="json"))
    changed = [
        f"{key}: {ours[key]!r} in the run, {theirs.get(key)!r} asked for"
        for key in ours
        if ours[key] != theirs.get(key)
    ]
    changed = [line for line in changed if not line.startswith(FREE)]
    if changed:
        raise ConfigError(
            "The run was started with another recipe.",
            problems=changed,
            meaning="Going on with other settings would give a run that nobody can repeat.",
            fix="Resume without these options, or start a new run with --out.",
        )


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _merged(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values with those of a recipe file on top."""
    result: dict[str, Any] = dict(stored)
    for key, section in long_form(given).items():
        both = isinstance(section, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **section} if both else section
    return result


def _assignments(options: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in _flat(options).items()]


def _with_path(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {**options, "data": {**options.get("data", {}), "path": source}}
