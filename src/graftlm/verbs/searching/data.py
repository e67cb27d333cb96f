"""Three parts of the data: to train on, to select by, and for the final figure, which nobody selects by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.core.errors import DataError, UsageError
from graftlm.core.files import write_atomic
from graftlm.data.sources import read_rows
from graftlm.tasks.base import Task
from graftlm.tasks.records import RecordTask
from graftlm.tasks.table import task_of
from graftlm.training.recipe import Recipe

TRAIN, SELECTION, FINAL = "train.jsonl", "selection.jsonl", "final.jsonl"
FEW = 60
"""Rows of a held-out part below which differences between trials are mostly noise."""


@dataclass(frozen=True)
class Parts:
    """Where the three parts lie, and what of the recipe was settled while all rows were seen."""

    folder: Path
    rows: Mapping[str, int]
    settled: Mapping[str, Any]
    """Sections of the recipe: the task with its labels, and how rows are packed."""
    why: str
    """Why it is this task."""

    @property
    def train(self) -> Path:
        return self.folder / TRAIN

    @property
    def selection(self) -> Path:
        return self.folder / SELECTION

    @property
    def final(self) -> Path:
        return self.folder / FINAL


def part(recipe: Recipe, folder: Path) -> Parts:
    """Write the three parts into `folder`.

    Rows that are equal or nearly so never lie in two parts. Where the recipe has held-out rows in a file of
    their own, those are for the final figure, and rows to select by are held out of the training rows.

    Raises:
        DataError: too few rows; UsageError: a task that has its rows in several files.
    """
    given = recipe.data.eval_path
    task = _read(recipe, recipe.data.path)
    settled = task.settled()
    sections: dict[str, Any] = {"task": settled.task.as_dict()}
    if settled.data.packing != recipe.data.packing:
        sections["data"] = {"packing": settled.data.packing}
    source = _by_number(recipe.data.path)
    used = _numbers(task)
    if given is None:
        final_numbers = set(_held_out(task))
        final = [source[number] for number in source if number in final_numbers]
    else:
        final_numbers, final = set(), list(_by_number(given).values())
    rest = [source[number] for number in source if number in used and number not in final_numbers]
    _write(folder / TRAIN, rest)
    again = _read(settled, str(folder / TRAIN))
    chosen = set(_held_out(again))
    selection = [row for number, row in enumerate(rest, start=1) if number in chosen]
    train = [row for number, row in enumerate(rest, start=1) if number not in chosen]
    for name, rows in ((TRAIN, train), (SELECTION, selection), (FINAL, final)):
        if not rows:
            raise DataError(
                f"{recipe.data.path} has too few rows for three parts: none is left for {name}.",
                meaning="A search needs rows to train on, rows to select by, and rows for the final figure.",
                fix="Give more rows, or the final ones in a file of their own: --set data.eval_path=FILE",
            )
        _write(folder / name, rows)
    counts = {TRAIN: len(train), SELECTION: len(selection), FINAL: len(final)}
    return Parts(folder, counts, sections, task.why)


def _read(recipe: Recipe, path: str) -> RecordTask[Any, Any, Any]:
    """The task with its rows read from `path`, some of them held out."""
    data = {key: value for key, value in recipe.data if key in recipe.data.model_fields_set}
    section = type(recipe.data)(**(data | {"path": path, "eval_path": None}))
    task: Task[Any] = task_of(recipe.model_copy(update={"data": section}))
    if not isinstance(task, RecordTask):
        raise UsageError(
            f"A search cannot part the rows of task {recipe.task.type}.",
            meaning="Its rows lie in several files, one for each task.",
            fix="Search the settings of one task at a time.",
        )
    task.read()
    return task


def _held_out(task: RecordTask[Any, Any, Any]) -> Sequence[int]:
    return [record.row for record in task.raw.held_out]


def _numbers(task: RecordTask[Any, Any, Any]) -> set[int]:
    return {record.row for record in (*task.raw.train, *task.raw.held_out)}


def _by_number(path: str) -> dict[int, Mapping[str, Any]]:
    found = read_rows(path)
    return dict(zip(found.numbers, found.rows, strict=True))


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomic(path, "".join(lines).encode("utf-8", "surrogatepass"))
