"""`graft check`: what is in a data file, what is wrong with it, and what would be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from graftlm.core.config import override
from graftlm.core.errors import DataError, UsageError
from graftlm.data.check_source import check_source
from graftlm.data.report import CheckReport
from graftlm.data.sources import read_rows
from graftlm.data.task_report import TaskReport, task_report
from graftlm.data.templates import TemplateName
from graftlm.models.load import load_tokenizer
from graftlm.objectives.settings import AUTO
from graftlm.tasks.auto import Told, told
from graftlm.training.task_section import TaskChoice
from graftlm.verbs.task_readings import READINGS

WINDOW = 1024
"""Tokens, where nobody says; a recipe's default."""


def check(
    data: str | Path,
    *,
    model: str | None = None,
    max_length: int | None = None,
    format: str = "auto",
    template: str = "auto",
    task: str = AUTO,
    overrides: Sequence[str] = (),
) -> CheckReport | TaskReport:
    """Look at `data` as `task` reads it. Writes nothing.

    Lengths are counted with the tokenizer of `model`; without one, characters are counted.

    Args:
        max_length: tokens of a training window; 1,024 unless given.
        task: what is to be learnt; `auto` tells it from the data, and from the base where `model` names one.
        overrides: `task.field=value` assignments, such as the labels that there are.

    Raises:
        DataError: nothing in the file can be read, or nothing of it can be trained on.
        UsageError: an option that has no effect without a model.
    """
    if model is None and (max_length is not None or template != "auto"):
        option = "max_length" if max_length is not None else "template"
        raise UsageError(
            f"{option} has no effect without a model.",
            meaning="Windows and chat templates belong to a tokenizer; without one, check counts characters.",
            fix="Name the model: --model M",
        )
    choice = _choice(task, overrides)
    found = Told(task, "it was asked for")
    if task == AUTO:
        found = told(str(data), format, model)
        choice = _choice(found.task, overrides)
    tokenizer = None if model is None else load_tokenizer(model)
    if choice.type in READINGS:
        return _as_read(data, format, found, choice, tokenizer, max_length)
    chosen = cast(TemplateName, template)  # any other word is refused below, by name
    return check_source(data, tokenizer, format=format, max_length=max_length or WINDOW, template=chosen)


def _choice(task: str, overrides: Sequence[str]) -> TaskChoice:
    other = next((each for each in overrides if not each.startswith("task.")), None)
    if other is not None:
        raise UsageError(
            f"{other} has no effect on a check.",
            meaning="Only settings of the task change how rows are read.",
            fix="Leave it out; the other options of `graft check` have flags of their own.",
        )
    return TaskChoice.parse(override({"task": {"type": task}}, overrides)["task"])


def _as_read(
    data: str | Path, format: str, found: Told, choice: TaskChoice, tokenizer: Any, max_length: int | None
) -> TaskReport:
    rows = read_rows(data)
    reading = READINGS[choice.type](rows, format, str(data), choice.settings)
    problems = (*rows.problems, *reading.problems)
    if not reading.records:
        raise DataError(
            f"{data} has no row for task {choice.type}.",
            problems=[str(problem) for problem in problems],
            meaning="Every row has a problem.",
            fix="Correct the rows listed above.",
        )
    broken = {problem.row for problem in rows.problems if problem.severity == "error"}
    return task_report(
        reading,
        source=str(data),
        task=choice.type,
        why=found.why,
        rows=len(rows.rows) + len(broken),
        broken=rows.problems,
        tokenizer=tokenizer,
        max_length=None if tokenizer is None else max_length or WINDOW,
    )
