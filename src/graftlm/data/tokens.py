"""Rendered examples to token ids, with the trained tokens proved.

What the model sees before an answer must be, token by token, what it will see at inference. So for every
answer the text before it is tokenised alone as well, and one of these holds:

1. *prefix*: those ids are the beginning of the ids of the whole text (nearly always).
2. *split*: a tokenizer that joins characters across the border (GPT-2 joins two line breaks, but only at
   the end of a text) is asked for both sides one by one; they must decode to the same text.
   (With several answers in a row this holds for the tokens next to each answer; the history before them
   may be cut differently at inference, where it is inside the text.)
3. *offsets*: where even that changes the text, the whole is used, and the token that joins the end of the
   prompt with the beginning of the answer is trained; the row is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from graftlm.core.errors import DataError
from graftlm.data.records import Example
from graftlm.data.segments import Span, to_spans
from graftlm.data.templates import Template
from graftlm.data.tokenizer import Tokenizer

TrainOn = Literal["completion", "all"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One whole example, however long.

    answers: (first token, one past the last token) of every answer.
    merged: whether a token joins the end of a prompt with the beginning of its answer.
    """

    ids: list[int]
    trained: list[bool]
    answers: list[Span]
    merged: bool


def tokenise(
    examples: Sequence[Example], tokenizer: Tokenizer, template: Template, train_on: TrainOn
) -> list[Tokens | DataError]:
    """Tokens of every example, or the error in place of one that cannot be rendered."""
    results: list[Tokens | DataError] = []
    texts: list[str] = []
    spans: list[list[Span]] = []
    places: list[int] = []
    for place, example in enumerate(examples):
        try:
            text, trained = to_spans(template.segments(example))
        except DataError as error:
            results.append(error)
            continue
        results.append(Tokens([], [], [], merged=False))
        places.append(place)
        texts.append(text)
        spans.append(trained)
    if not texts:
        return results
    ids, offsets = _ids(texts, tokenizer)
    before = _tokens_before(texts, spans, ids, tokenizer)
    for index, place in enumerate(places):
        if offsets[index] is not None and None in before[index].values():
            ids[index], offsets[index] = _split(
                texts[index], ids[index], offsets[index], before[index], tokenizer
            )
        answers, merged = _answers(ids[index], offsets[index], spans[index], before[index])
        if answers is None:
            results[place] = _merged_without_offsets(examples[place].row)
            continue
        flags = [train_on == "all"] * len(ids[index])
        for first, last in answers:
            flags[first:last] = [True] * (last - first)
        results[place] = Tokens(ids[index], flags, answers, merged)
    return results


def _ids(texts: list[str], tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[Span] | None]]:
    # verbose=False: "longer than the model's maximum" is ours to say, with row numbers.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if not tokenizer.is_fast:
        return list(tokenizer(texts, **options)["input_ids"]), [None] * len(texts)
    encoded = tokenizer(texts, return_offsets_mapping=True, **options)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _tokens_before(
    texts: list[str], spans: list[list[Span]], ids: list[list[int]], tokenizer: Tokenizer
) -> list[dict[int, int | None]]:
    """Per row: character position -> number of tokens before it, None if one straddles it.

    Starts of answers always; their ends only without offsets (an end is closed by an end token).
    """
    found: list[dict[int, int | None]] = [{0: 0, len(text): len(ids[row])} for row, text in enumerate(texts)]
    wanted = [
        (row, edge)
        for row, trained in enumerate(spans)
        for span in trained
        for edge in (span[:1] if tokenizer.is_fast else span)
        if edge not in found[row]
    ]
    if wanted:
        prefixes = _ids([texts[row][:edge] for row, edge in wanted], tokenizer)[0]
        for (row, edge), prefix in zip(wanted, prefixes, strict=True):
            found[row][edge] = len(prefix) if ids[row][: len(prefix)] == prefix else None
    return found


def _split(
    text: str,
    ids: list[int],
    offsets: list[Span] | None,
    before: dict[int, int | None],
    tokenizer: Tokenizer,
) -> tuple[list[int], list[Span] | None]:
    """Tokenise both sides of every border that a token straddles; unchanged if that changes the text."""
    cuts = [0, *sorted(edge for edge, count in before.items() if count is None), len(text)]
    parts, part_offsets = _ids([text[start:stop] for start, stop in pairwise(cuts)], tokenizer)
    joined = [token for part in parts for token in part]
    if tokenizer.decode(joined) != tokenizer.decode(ids):
        return ids, offsets
    shifted = [
        (start + cut, stop + cut)
        for cut, part in zip(cuts, part_offsets, strict=False)
        for start, stop in part or ()
    ]
    whole = dict(before)
    before.clear()  # counts of tokens changed; those at the cuts are known, ends are found by offsets
    count = 0
    for cut, part in zip(cuts, parts, strict=False):
        before[cut] = count
        count += len(part)
    before[len(text)] = count
    inner = [edge for edge in whole if edge not in before]
    for edge in inner:
        before[edge] = next((i for i, offset in enumerate(shifted) if offset[0] >= edge), len(joined))
    return joined, shifted


def _answers(
    ids: list[int], offsets: list[Span] | None, spans: list[Span], before: dict[int, int | None]
) -> tuple[list[Span] | None, bool]:
    answers: list[Span] = []
    merged = False
    for start, end in spans:
        first, last = before.get(start), before.get(end)
        if offsets is None:
            if first is None or last is None:
                return None, True
        else:
            if first is None:
                merged = True
                first = next((i for i, offset in enumerate(offsets) if offset[1] > start), len(ids))
            if last is None:
                last = next((i for i in range(first, len(ids)) if offsets[i][0] >= end), len(ids))
        answers.append((first, max(first, last)))
    return answers, merged


def _merged_without_offsets(row: int) -> DataError:
    return DataError(
        f"row {row}: this tokenizer joins the end of the prompt with the beginning of the answer.",
        meaning="It is a slow tokenizer, which cannot tell which characters a token stands for.",
        fix="Use the model's fast tokenizer (tokenizer.json), or end the prompts with a line break.",
    )
