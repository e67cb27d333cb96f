"""Text that the base already knew, to measure what an adapter made it forget.

Two sources: rows of a file, or text that the base itself writes. The second works for every model: on
text drawn from the base, the rise of the loss is an unbiased estimate of KL(base || adapted model) per
token, so it is zero only where nothing changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graftlm.core.errors import DataError, ModelError
from graftlm.evaluation.rows import IGNORED, TokenRow, Tokens, prompt_and_reference
from graftlm.models.generate import (
    Generated,
    Progress,
    Sampling,
    StopFlag,
    context_length,
    generate_ids,
    stop_token_ids,
)

OPENING = 8
"""Tokens taken from the start of a prompt where the base has no begin token to start from."""


def known_from_texts(texts: Sequence[str], tokenizer: Any, *, max_length: int) -> list[Tokens]:
    """Rows of running text, at most `max_length` tokens each; every token after the first is a target.

    Raises:
        DataError: no text gives two tokens.
    """
    rows = []
    for number, text in enumerate(texts, start=1):
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        if len(ids) >= 2:
            rows.append(Tokens(tuple(ids), (IGNORED, *ids[1:]), row=number))
    if not rows:
        raise DataError("No text of at least two tokens.", fix="Give a file with running text.")
    return rows


def sample_known_text(
    base: nn.Module,
    tokenizer: Any,
    *,
    rows: int = 64,
    tokens: int = 128,
    seed: int = 0,
    openings: Sequence[TokenRow] = (),
    rows_per_batch: int = 32,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> list[Tokens]:
    """`rows` texts of at most `tokens` new tokens that `base` writes at temperature 1.

    Texts start from the begin token, or, with `openings`, from the first `OPENING` tokens of those rows'
    prompts in turn (for bases that were only ever trained on prompts). What was given is never a target;
    an end token that the base wrote ends the row and is one. Call it with adapters disabled, or before
    any is attached.

    Raises:
        ModelError: no begin token and no openings, or the base ends every text at once.
    """
    starts = _starts(base, tokenizer, rows, openings)
    room = context_length(base)
    wanted = tokens if room is None else min(tokens, room - max(map(len, starts)))
    drawn = generate_ids(
        base,
        starts,
        max_new_tokens=wanted,
        stop_ids=stop_token_ids(base, tokenizer),
        sampling=Sampling(seed=seed),
        rows_per_batch=rows_per_batch,
        progress=progress,
        should_stop=should_stop,
    )
    if not any(result.token_ids for result in drawn):
        raise ModelError(
            "The base wrote no text.",
            meaning="It ends every text at once from this start.",
            fix="Give openings, or a file of text that the base should still know.",
        )
    return [
        _row(start, result, number)
        for number, (start, result) in enumerate(zip(starts, drawn, strict=True), start=1)
        if result.token_ids or result.end_id is not None
    ]


def _row(start: Sequence[int], result: Generated, number: int) -> Tokens:
    written = result.token_ids if result.end_id is None else (*result.token_ids, result.end_id)
    return Tokens((*start, *written), (*[IGNORED] * len(start), *written), row=number)


def _starts(base: Any, tokenizer: Any, rows: int, openings: Sequence[TokenRow]) -> list[list[int]]:
    prompts = [pair[0][:OPENING] for row in openings if (pair := prompt_and_reference(row)) is not None]
    prompts += [list(row.input_ids[:OPENING]) for row in openings if prompt_and_reference(row) is None]
    if prompts:
        return [prompts[number % len(prompts)] for number in range(rows)]
    begin = _begin_token(base, tokenizer)
    if begin is None:
        raise ModelError(
            "This base has no begin token to start a text from.",
            fix="Give openings (held-out rows), or a file of text that the base should still know.",
        )
    return [[begin]] * rows


def _begin_token(base: Any, tokenizer: Any) -> int | None:
    """The token that opens a text: `bos`, or the end-of-text token of models trained on joined documents."""
    listed = (tokenizer.bos_token_id, getattr(base.config, "bos_token_id", None), tokenizer.eos_token_id)
    return next((int(token) for token in listed if isinstance(token, int)), None)
