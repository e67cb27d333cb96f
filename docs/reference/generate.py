"""Writes the reference pages from the code: `python docs/reference/generate.py`. A test holds them fresh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from graftlm.training.recipe import Recipe

HERE = Path(__file__).parent
VERBS = ("demo", "check", "tune", "eval", "merge", "chat", "env")


def recipe_page() -> str:
    """Every section and field of a recipe, with default and meaning."""
    lines = ["# The recipe", "", "Written by `docs/reference/generate.py`.", "",
             "`graft tune recipe.yaml` reads one YAML file. Only `model` and `data` have no default, and",
             "`model: sprout` and `data: rows.jsonl` are enough. Unknown keys are errors.", ""]  # fmt: skip
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            lines += [f"## {name}", "", f"{_kind(field.annotation)}; default `{field.default}`", ""]
            continue
        lines += [f"## {name}", "", (section.__doc__ or "").strip().splitlines()[0], ""]
        lines += ["| field | values | default | meaning |", "|---|---|---|---|"]
        lines += [_row(key, inner) for key, inner in section.model_fields.items()]
        lines.append("")
    return "\n".join(lines)


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_plain(field.default)}`"
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {_kind(field.annotation)} | {default} | {meaning} |".replace("  ", " ")


def _plain(value: Any) -> str:
    """A value as YAML spells it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _kind(annotation: Any) -> str:
    """A type as a person reads it."""
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is None:
        return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}.get(
            annotation.__name__, annotation.__name__
        )
    inner = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    if str(get_origin(annotation)).endswith("Literal"):
        return ", ".join(f"`{_plain(value)}`" for value in inner)
    prefix = "list of " if get_origin(annotation) is tuple else ""
    return prefix + " or ".join(_kind(argument) for argument in inner)


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
