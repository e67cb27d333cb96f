"""Base and adapter on rows of the adapter's task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftlm.core.progress import progress
from graftlm.diagnosis.facts.behaviour import Change
from graftlm.evaluation.compare import compare
from graftlm.evaluation.rows import TokenRow
from graftlm.models.generate import context_length, generate_ids, stop_token_ids
from graftlm.tasks.base import Task
from graftlm.tasks.preference import PreferenceTask
from graftlm.tasks.table import task_of
from graftlm.training.defaults import fitted_length
from graftlm.verbs.diagnosing.as_change import change_of, mean_change
from graftlm.verbs.diagnosing.loaded import Loaded
from graftlm.verbs.diagnosing.subject import Subject
from graftlm.verbs.evaluate import recipe_on
from graftlm.verbs.references import Reference

MOST_ROWS = 256
"""Rows of the data that was named."""
PROMPTS, ANSWER = 32, 128
"""Held-out prompts that are answered, and the longest answer in tokens."""


def task_loss(loaded: Loaded, subject: Subject) -> Change:
    """The loss of base and adapter on the data that somebody named.

    Raises:
        DataError: the data cannot be read, or are no rows of this task.
    """
    assert subject.data is not None and subject.base is not None
    reference = Reference(loaded.folder, subject.base, subject.run)
    task = task_of(recipe_on(reference, subject.data))
    task.read_held_out(MOST_ROWS)
    _encode(task, loaded)
    with loaded.adapters.disabled(), progress("measuring base") as tick:
        before = task.measure(loaded.model, loaded.tokenizer, name="base", progress=tick, stop=lambda: False)
    with progress("measuring adapter") as tick:
        after = task.measure(
            loaded.model, loaded.tokenizer, name="adapter", progress=tick, stop=lambda: False
        )
    return change_of(compare(before, after).loss)


def answer_lengths(loaded: Loaded, subject: Subject) -> Change | None:
    """How long answers to held-out prompts are, of a run that learnt from preferences."""
    recipe = subject.recipe()
    task = None if recipe is None or recipe.task.type not in PREFERENCES else task_of(recipe)
    if not isinstance(task, PreferenceTask):
        return None
    task.read()
    _encode(task, loaded)
    prompts = [list(row.input_ids) for row in _some(task.openings)]
    after = _lengths(loaded, prompts)
    with loaded.adapters.disabled():
        before = _lengths(loaded, prompts)
    return mean_change(before, after)


PREFERENCES = ("dpo", "ipo", "simpo", "orpo")


def _encode(task: Task[Any], loaded: Loaded) -> None:
    task.require_base(loaded.model)
    task.recipe = fitted_length(task.recipe, context_length(loaded.model))
    task.encode(loaded.tokenizer)


def _some(rows: Sequence[TokenRow]) -> Sequence[TokenRow]:
    return rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]


def _lengths(loaded: Loaded, prompts: list[list[int]]) -> list[float]:
    room = context_length(loaded.model)
    fitting = [prompt[-(room - ANSWER) :] if room is not None else prompt for prompt in prompts]
    with progress("answering held-out prompts") as tick:
        written = generate_ids(
            loaded.model,
            fitting,
            max_new_tokens=ANSWER,
            stop_ids=stop_token_ids(loaded.model, loaded.tokenizer),
            progress=tick,
        )
    return [float(max(1, len(answer.token_ids))) for answer in written]
