"""Lengths of a recipe's rows: counted by its task where a tokenizer is at hand, else told from characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftlm.core.errors import ModelError
from graftlm.core.notices import notice
from graftlm.data.records import Example
from graftlm.models.load import load_tokenizer
from graftlm.planning.base_facts import BaseFacts, empty_model
from graftlm.planning.rows import RowLengths
from graftlm.tasks.base import Task
from graftlm.tasks.dataset import Row
from graftlm.tasks.multi import MultiTask
from graftlm.tasks.records import RecordTask
from graftlm.training.defaults import fitted_length, room_beside
from graftlm.training.parts import parts_of
from graftlm.training.recipe import Recipe

CHARACTERS_PER_TOKEN = 4.0
"""Of English text with vocabularies of 32,000 and more; other languages and code have fewer."""
_TEMPLATE_TOKENS = 8
"""What a template adds to a turn, about."""
_LABELLED_SHARE = 0.5
"""Of the tokens, where the shape of the rows does not tell."""


def row_lengths(task: Task[Any], recipe: Recipe, facts: BaseFacts) -> tuple[RowLengths, Recipe]:
    """Lengths of the rows of a task that has read its data, and the recipe with what the task settled.

    Raises:
        DataError: nothing of the data can be used; ConfigError: a length beyond the base's context.
    """
    task.recipe = recipe
    recipe = task.settled()
    try:
        tokenizer = load_tokenizer(recipe.model.name)
    except ModelError as error:
        notice(f"Tokens are estimated from characters: {error.seen}")
        return _estimated(task), recipe
    for _, part, own in _parts(task, recipe):
        part.require_base(empty_model(facts.config, facts.name, facts.ending))  # what it encodes for
        part.recipe = fitted_length(own, room_beside(own.method.config, facts.context or None))
        part.encode(tokenizer)
    found = [counted(part) for _, part, _ in _parts(task, recipe)]
    return joined(found), recipe


def counted(task: Task[Any]) -> RowLengths:
    """Of a task that has encoded its data."""
    train: Sequence[Row] = task.dataset.train
    return RowLengths(
        tuple(row.tokens for row in train),
        tuple(row.target_tokens for row in train),
        tuple(row.tokens for row in task.dataset.held_out),
        task.rate_scale,
    )


def joined(parts: Sequence[RowLengths]) -> RowLengths:
    """The rows of several tasks of one run."""
    if len(parts) == 1:
        return parts[0]
    return RowLengths(
        tuple(length for part in parts for length in part.train),
        tuple(count for part in parts for count in part.targets),
        tuple(length for part in parts for length in part.held_out),
        min(part.rate_scale for part in parts),
        all(part.is_counted for part in parts),
    )


def _parts(task: Task[Any], recipe: Recipe) -> list[tuple[str, Task[Any], Recipe]]:
    if not isinstance(task, MultiTask):
        return [("", task, recipe)]
    return [(name, task.parts[name], own) for name, own in parts_of(recipe).items()]


def _estimated(task: Task[Any]) -> RowLengths:
    tasks = task.parts.values() if isinstance(task, MultiTask) else [task]
    return joined([_by_characters(part) for part in tasks])


def _by_characters(task: Task[Any]) -> RowLengths:
    if not isinstance(task, RecordTask):
        raise ModelError(
            f"Rows of task {task.name} cannot be counted without the tokenizer of the base.",
            fix="Name a base whose tokenizer is on this machine.",
        )
    most = task.recipe.data.max_length
    tokens = [[min(most, _tokens(record)) for record in part] for part in (task.raw.train, task.raw.held_out)]
    targets = [round(_share(record) * n) for record, n in zip(task.raw.train, tokens[0], strict=True)]
    return RowLengths(tuple(tokens[0]), tuple(targets), tuple(tokens[1]), task.rate_scale, is_counted=False)


def _tokens(record: Any) -> int:
    turns = len(record.turns) if isinstance(record, Example) else 1
    return max(1, round(len(record.text) / CHARACTERS_PER_TOKEN) + _TEMPLATE_TOKENS * turns)


def _share(record: Any) -> float:
    if not isinstance(record, Example):
        return _LABELLED_SHARE
    trained = sum(len(turn.text) for turn in record.turns if turn.trained)
    return trained / max(1, len(record.text))
