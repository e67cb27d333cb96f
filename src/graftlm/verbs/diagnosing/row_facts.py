"""How rows begin and end, and what of them is learnt: from token ids and labels alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from graftlm.data.encode import IGNORED
from graftlm.data.tokenizer import begin_mark
from graftlm.diagnosis.facts.data import Begins, Cuts, Ends, Masks
from graftlm.verbs.diagnosing.rows import View, whole_texts

SHOWN = 5
"""Row numbers that are kept as examples."""
UNLIMITED = 10**9
"""Tokenizers that know of no limit name a number beyond this."""
POINTS = 101
"""Lengths that are kept for the picture."""


def ends_of(
    found: Sequence[View], tokenizer: Any, end_ids: Collection[int], unfinished: Collection[int] = ()
) -> Ends:
    """Of rows that were not cut. `unfinished`: numbers of rows whose text goes on in the next row."""
    whole = [view for view in whole_texts(found)[1] if not view.is_cut and view.row not in unfinished]
    whole = [view for view in whole if view.last_trained >= 0]
    without = [view for view in whole if view.labels[view.last_trained] not in end_ids]
    masked = sum(_ends_unlearnt(view, end_ids) for view in without)
    return Ends(
        rows=len(whole),
        without=len(without),
        masked=masked,
        token=", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in end_ids),
        pad_is_end=tokenizer.pad_token_id in end_ids,
        examples=_numbers(without),
    )


def _ends_unlearnt(view: View, end_ids: Collection[int]) -> bool:
    after = view.last_trained + 1
    return after < len(view.ids) and view.ids[after] in end_ids


def begins_of(found: Sequence[View], tokenizer: Any, *, is_expected: bool) -> Begins | None:
    """Of rows that were not cut, as long prompts may lose their beginning. None where the tokenizer has no
    begin token, or nothing is read from its beginning on."""
    begin = tokenizer.bos_token_id
    firsts = [view for view in whole_texts(found)[0] if view.begins and not view.is_cut]
    if begin is None or not firsts:
        return None
    doubled = [view for view in firsts if list(view.ids[:2]) == [begin, begin]]
    without = [view for view in firsts if list(view.ids[:1]) != [begin]]
    shown = doubled or (without if is_expected else [])
    return Begins(
        rows=len(firsts),
        doubled=len(doubled),
        without=len(without),
        token=str(tokenizer.bos_token),
        is_expected=is_expected,
        examples=_numbers(shown),
    )


def expects_begin(tokenizer: Any, *, is_chat: bool) -> bool:
    """Whether a prompt begins with the begin token when the model is used."""
    from jinja2 import TemplateError

    if not is_chat or not tokenizer.chat_template:
        return bool(begin_mark(tokenizer))
    asked = [{"role": "user", "content": "a"}]
    try:
        text = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError):  # a template that wants more than a question
        return False
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


def masks_of(
    found: Sequence[View], *, prompted: int = 0, compared: int = 0, wrong: Sequence[int] = ()
) -> Masks:
    """`prompted`: how many rows have a prompt. `compared`, `wrong`: how many rows were compared with their
    answers, and the numbers of those whose trained tokens say something else."""
    untrained = [view for view in found if view.last_trained < 0]
    return Masks(
        rows=len(found),
        untrained=len(untrained),
        # The very first token of a row is never learnt: nothing predicts it.
        tokens=sum(len(view.ids) - view.begins for view in found),
        trained=sum(label != IGNORED for view in found for label in view.labels),
        prompted=prompted,
        compared=compared,
        wrong=len(wrong),
        examples=(*_numbers(untrained), *wrong)[:SHOWN],
    )


def cuts_of(
    found: Sequence[View],
    end_ids: Collection[int],
    *,
    limit: int,
    lengths: Sequence[int],
    tokenizer: Any,
    dropped: Sequence[int] = (),
) -> Cuts:
    """`lengths`: of all rows, before anything was left out as far as that is known. `dropped`: numbers of
    rows that were left out whole because of their length."""
    cut = [view for view in found if view.is_cut]
    answers = [view for view in cut if view.labels[view.last_trained] not in end_ids]
    ordered, context = sorted(lengths), int(tokenizer.model_max_length)
    return Cuts(
        rows=len({view.row for view in found} | set(dropped)),
        answers=len({view.row for view in answers} | set(dropped)),
        others=len({view.row for view in cut} - {view.row for view in answers}),
        limit=limit,
        percentile_95=_at(ordered, 0.95),
        wanted=_at(ordered, 0.99),
        context=context if 0 < context < UNLIMITED else 0,
        examples=tuple(sorted({*(view.row for view in answers), *dropped}))[:SHOWN],
        lengths=tuple(_at(ordered, place / (POINTS - 1)) for place in range(POINTS)) if ordered else (),
    )


def _at(ordered: Sequence[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def _numbers(found: Iterable[View]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(view.row for view in found))[:SHOWN]
