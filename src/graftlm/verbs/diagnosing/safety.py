"""What base and adapter refuse, of prompts that should be refused and of some that only look so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.errors import DataError
from graftlm.core.progress import progress
from graftlm.data.prompts import EncodedPrompt, encode_prompts, to_prompts
from graftlm.data.sources import read_rows
from graftlm.diagnosis.facts.behaviour import Refusals, Safety
from graftlm.evaluation.refusals import is_readable, is_refusal
from graftlm.models.generate import context_length, decode, generate_ids, stop_token_ids
from graftlm.verbs.diagnosing.loaded import Loaded

LABEL, KINDS = "label", ("unsafe", "safe")
ANSWER = 48
"""Tokens in which a refusal shows itself."""
NO_LIMIT = 2**20


def safety_facts(loaded: Loaded, file: Path) -> Safety:
    """Answer every prompt of a file greedily, without and with the adapter.

    The file has a column of prompts and a column `label`, which says `safe` or `unsafe`, as XSTest has.

    Raises:
        DataError: a column is missing, or one of the two kinds has no prompt.
    """
    kinds, prompts = _prompts(loaded, file)
    after = _answers(loaded, prompts, "adapter")
    with loaded.adapters.disabled():
        before = _answers(loaded, prompts, "base")
    return counted(kinds, before, after)


def counted(kinds: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Safety:
    """Refusals by kind; a prompt with an answer that is no text is left out on both sides.

    >>> found = counted(["unsafe"] * 2, ["I can't help with that."] * 2, ["Sure, take a knife.", ""])
    >>> found.unsafe.lost, found.unsafe.prompts, found.unreadable
    (1, 1, 1)
    """
    told: dict[str, list[tuple[bool, bool]]] = {kind: [] for kind in KINDS}
    unreadable = 0
    for kind, old, new in zip(kinds, before, after, strict=True):
        if is_readable(old) and is_readable(new):
            told[kind].append((is_refusal(old), is_refusal(new)))
        else:
            unreadable += 1
    return Safety(_refusals(told["unsafe"]), _refusals(told["safe"]), unreadable)


def _refusals(pairs: Sequence[tuple[bool, bool]]) -> Refusals:
    return Refusals(
        prompts=len(pairs),
        before=sum(old for old, _ in pairs),
        after=sum(new for _, new in pairs),
        lost=sum(old and not new for old, new in pairs),
        gained=sum(new and not old for old, new in pairs),
    )


def _prompts(loaded: Loaded, file: Path) -> tuple[list[str], tuple[EncodedPrompt, ...]]:
    found = read_rows(file)
    kinds = {number: _kind(row) for number, row in zip(found.numbers, found.rows, strict=True)}
    missing = [kind for kind in KINDS if kind not in kinds.values()]
    if missing:
        raise DataError(
            f"{file} has no prompt whose {LABEL} is {' or '.join(missing)}.",
            meaning="Both kinds are needed: what is no longer refused, and what is refused without need.",
            fix="Give rows with a column of prompts and a column label (safe, unsafe), such as XSTest.",
        )
    plain = [{key: value for key, value in row.items() if key != LABEL} for row in found.rows]
    asked, _, problems = to_prompts(plain, "auto", found.numbers, str(file))
    if problems:
        raise DataError(
            f"{file}: {len(problems)} rows are no prompts.",
            problems=[f"row {problem.row}: {problem.what}" for problem in problems[:20]],
        )
    room = (context_length(loaded.model) or NO_LIMIT) - ANSWER
    encoded, _ = encode_prompts(asked, loaded.tokenizer, room)
    kept = tuple(prompt for prompt in encoded if kinds[prompt.row] in KINDS)
    return [kinds[prompt.row] for prompt in kept], kept


def _kind(row: Mapping[str, Any]) -> str:
    return str(row.get(LABEL, "")).strip().lower()


def _answers(loaded: Loaded, prompts: Sequence[EncodedPrompt], who: str) -> list[str]:
    with progress(f"asking {who} what it refuses") as tick:
        written = generate_ids(
            loaded.model,
            [prompt.input_ids for prompt in prompts],
            max_new_tokens=ANSWER,
            stop_ids=stop_token_ids(loaded.model, loaded.tokenizer),
            rows_per_batch=32,
            progress=tick,
        )
    return [decode(loaded.tokenizer, answer.token_ids) for answer in written]
