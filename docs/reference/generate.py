"""Writes the reference pages from the code: `python docs/reference/generate.py`. A test holds them fresh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from graftlm.methods.table import METHODS
from graftlm.objectives.settings import SETTINGS
from graftlm.tasks.table import TASKS
from graftlm.training.method_section import TYPES, Method
from graftlm.training.recipe import Recipe
from graftlm.training.task_section import TaskChoice

HERE = Path(__file__).parent
VERBS = ("demo", "check", "plan", "tune", "eval", "search", "diagnose", "merge", "combine", "chat", "env")


def recipe_page() -> str:
    """Every section and field of a recipe, with default and meaning."""
    lines = ["# The recipe", "", "Written by `docs/reference/generate.py`.", "",
             "`graft tune recipe.yaml` reads one YAML file. Only `model` and `data` have no default, and",
             "`model: sprout` and `data: rows.jsonl` are enough. Unknown keys are errors.", ""]  # fmt: skip
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if section is Method:
            lines += _methods()
            continue
        if section is TaskChoice:
            lines += _tasks()
            continue
        if not _is_config(section):
            lines += [f"## {name}", "", f"{_kind(field.annotation)}; default `{field.default}`", ""]
            continue
        lines += [f"## {name}", "", (section.__doc__ or "").strip().splitlines()[0], ""]
        lines += ["| field | values | default | meaning |", "|---|---|---|---|"]
        lines += [_row(key, inner) for key, inner in section.model_fields.items()]
        lines.append("")
    return "\n".join(lines)


def _methods() -> list[str]:
    """Every type of the `method` section, with the fields of its config."""
    lines = ["## method", "", "`type` picks the method; default `lora`. Other packages go by their own type.",
             "", "| type | what is trained | starts with |", "|---|---|---|"]  # fmt: skip
    for name, kind in TYPES.items():
        fields = ", ".join(f"`{key}: {_plain(value)}`" for key, value in kind.fields.items())
        lines.append(f"| `{name}` | {kind.meaning} | {fields} |")
    for peft_type, config in METHODS.items():
        names = ", ".join(f"`{name}`" for name, kind in TYPES.items() if kind.peft_type == peft_type)
        lines += ["", f"### {names}", "", (config.__doc__ or "").strip().splitlines()[0], ""]
        lines += ["| field | values | default | meaning |", "|---|---|---|---|"]
        lines += [_row(key, inner) for key, inner in config.model_fields.items()]
    return [*lines, ""]


def _tasks() -> list[str]:
    """Every type of the `task` section, with its settings."""
    lines = ["## task", "", "`type` says what is learnt; default `auto`. `task: dpo` is short for",
             "`task: {type: dpo}`; on the command line `--task dpo --set task.beta=0.2`.", "",
             "| type | what is learnt |", "|---|---|"]  # fmt: skip
    lines += [
        f"| `{name}` | {_first_line(TASKS.get(name, settings))} |" for name, settings in SETTINGS.items()
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    rows: dict[str, tuple[str, ...]] = {
        name: tuple(_row(key, inner) for key, inner in settings.model_fields.items())
        for name, settings in SETTINGS.items()
    }
    for name, fields in rows.items():
        groups.setdefault(fields, []).append(name)
    for fields, names in groups.items():
        if fields:
            lines += ["", f"### {', '.join(f'`{name}`' for name in names)}", ""]
            lines += ["| field | values | default | meaning |", "|---|---|---|---|", *fields]
    return [*lines, ""]


def _first_line(kind: type) -> str:
    """What a class says of itself, up to the first blank line."""
    return " ".join((kind.__doc__ or "").strip().partition("\n\n")[0].split())


def _row(name: str, field: FieldInfo) -> str:
    default = (
        "required" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
    )
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {_kind(field.annotation)} | {default} | {meaning} |".replace("  ", " ")


def _plain(value: Any) -> str:
    """A value as YAML spells it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "[]"
    return str(value)


def _kind(annotation: Any) -> str:
    """A type as a person reads it."""
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is None and not _is_config(annotation):
        return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}.get(
            annotation.__name__, annotation.__name__
        )
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (dict, Mapping):
        key, value = get_args(annotation)
        return f"mapping of {_kind(key)} to {_kind(value)}"
    if _is_config(annotation):
        return "mapping with " + ", ".join(f"`{name}`" for name in annotation.model_fields)
    inner = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    if str(get_origin(annotation)).endswith("Literal"):
        return ", ".join(f"`{_plain(value)}`" for value in inner)
    prefix = "list of " if get_origin(annotation) is tuple else ""
    return prefix + " or ".join(_kind(argument) for argument in inner)


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def cli_page() -> str:
    """The help of every verb as a terminal shows it."""
    parts = ["# The command line", "", "Written by `docs/reference/generate.py`.", ""]
    for verb in VERBS:
        parts += [f"## graft {verb}", "", "```text", _help(verb), "```", ""]
    return "\n".join(parts)


def _help(verb: str) -> str:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "graftlm", verb, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / name).write_text(make().rstrip() + "\n", encoding="utf-8")
        print(HERE / name)
