"""Exact match: does the model, given a row's prompt, write the row's reference?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graftlm.evaluation.rows import TokenRow, prompt_and_reference
from graftlm.models.generate import Progress, StopFlag, decode, generate_ids, stop_token_ids

MARGIN = 8
"""Tokens beyond the longest reference that a prediction may take: enough to show that it went on."""
LONGEST = 256
"""No prediction is longer. A longer reference can't be matched; greedy answers of that length never are."""


@dataclass(frozen=True)
class Answer:
    """Prompt, prediction and reference of row `index`, as text."""

    index: int
    prompt: str
    prediction: str
    reference: str


@dataclass(frozen=True)
class Answers:
    """The answers in the order given; `complete` is False when the stop flag ended it early."""

    rows: tuple[Answer, ...]
    complete: bool


def answerable(rows: Sequence[TokenRow], most: int | None = None) -> list[int]:
    """Indices of rows that have a prompt; at most `most` of them, evenly spread over the order given.

    The choice depends on the rows only, so that the model before and the model after answer the same ones.
    """
    found = [index for index, row in enumerate(rows) if prompt_and_reference(row) is not None]
    if most is None or len(found) <= most:
        return found
    return [found[place * len(found) // most] for place in range(most)]


def answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[TokenRow],
    indices: Sequence[int],
    *,
    rows_per_batch: int = 16,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> Answers:
    """Greedy predictions for `rows[i]`, i in `indices`.

    The prompt is every id before the first target. A prediction ends at an end token: the tokenizer's,
    the model's, or the special token that ends a reference. Its limit is the longest reference plus
    `MARGIN`.
    """
    special = set(tokenizer.all_special_ids)
    ends = set(stop_token_ids(model, tokenizer))
    pairs = [pair for index in indices if (pair := prompt_and_reference(rows[index])) is not None]
    prompts = [prompt for prompt, _ in pairs]
    references = [_until(reference, ends | special) for _, reference in pairs]
    ends |= {
        pair[1][len(text)] for pair, text in zip(pairs, references, strict=True) if len(text) < len(pair[1])
    }
    limit = min(LONGEST, max(map(len, references), default=0) + MARGIN)
    results = generate_ids(
        model,
        prompts,
        max_new_tokens=limit,
        stop_ids=ends,
        rows_per_batch=rows_per_batch,
        progress=progress,
        should_stop=should_stop,
    )
    found = tuple(
        Answer(index, decode(tokenizer, prompt), decode(tokenizer, result.token_ids), decode(tokenizer, text))
        for index, prompt, result, text in zip(indices, prompts, results, references, strict=True)
        if result.finish != "cancelled"
    )
    return Answers(found, len(found) == len(indices))


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first of `ends`."""
    place = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:place])
