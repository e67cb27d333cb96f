"""Gathers `DataFacts`: kept by a run at its start, or read from data that somebody names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.core.errors import FormatError, UsageError
from graftlm.core.files import write_atomic
from graftlm.data.sources import read_rows
from graftlm.data.templates import choose_template, template_digest
from graftlm.diagnosis.facts.data import DataFacts
from graftlm.models.load import load_tokenizer
from graftlm.tasks.base import Task
from graftlm.tasks.table import task_of
from graftlm.training.recipe import make_recipe
from graftlm.verbs.diagnosing.foreign_rows import are_tokens, facts_of_tokens
from graftlm.verbs.diagnosing.subject import Subject
from graftlm.verbs.diagnosing.task_data import facts_of_task

KEPT = "data-facts.json"
"""In the run folder: the data may be gone when somebody asks."""


def data_facts(subject: Subject) -> DataFacts | None:
    """None where nobody named data, and the run kept nothing.

    Raises:
        DataError: the data cannot be read; UsageError: data without a base.
        FormatError: what the run kept is damaged.
    """
    if subject.data is not None:
        return _of_named(subject.data, subject.base)
    path = None if subject.run is None else subject.run / KEPT
    if path is None or not path.is_file():
        return None
    try:
        found = DataFacts.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError):
        raise FormatError(
            f"{path} does not hold facts of data.",
            meaning="It was edited or damaged.",
            fix="Remove it; then nothing is said of the data.",
        ) from None
    return _with_template_of_today(found, subject)


def keep_data_facts(run: Path, task: Task[Any], tokenizer: Any) -> None:
    """Gather the facts of a run that begins, and keep them in its folder; a run that goes on has them."""
    if not (run / KEPT).is_file():
        found = facts_of_task(task, tokenizer).as_dict()
        write_atomic(run / KEPT, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _of_named(data: str, base: str | None) -> DataFacts:
    if base is None:
        raise UsageError(
            f"Nobody says which base {data} is for.",
            meaning="What a row looks like to a model depends on its tokenizer.",
            fix="Name it: --base MODEL",
        )
    tokenizer = load_tokenizer(base)
    rows = read_rows(data)
    if are_tokens(rows.rows):
        return facts_of_tokens(rows.rows, rows.numbers, tokenizer)
    task = task_of(make_recipe({"model": {"name": base}, "data": {"path": data}}))
    task.read()
    task.encode(tokenizer)
    return facts_of_task(task, tokenizer)


def _with_template_of_today(found: DataFacts, subject: Subject) -> DataFacts:
    """Whether the base renders conversations as it did when the run began."""
    recipe = subject.recipe()
    if found.rendering is None or subject.base is None or recipe is None:
        return found
    now = choose_template(load_tokenizer(subject.base), recipe.data.template)
    return replace(found, rendering=replace(found.rendering, digest_now=template_digest(now)))
