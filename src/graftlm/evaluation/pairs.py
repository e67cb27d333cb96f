"""Loss and answers of an encoder-decoder on pairs of source and target, row by row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.data.encode import IGNORED
from graftlm.data.longest_first import longest_first
from graftlm.data.pair_batches import longest, padded
from graftlm.data.pairs import Pair
from graftlm.evaluation.perplexity import RowLoss, RowLosses, halving
from graftlm.evaluation.runner import EvaluatedRow, Evaluation, require_finite
from graftlm.evaluation.tasks import LONGEST, MARGIN
from graftlm.models.encoder_decoder import head_input
from graftlm.models.generate import (
    Generated,
    Progress,
    StopFlag,
    decode,
    evaluation_mode,
    input_device,
    stop_token_ids,
)
from graftlm.models.generate_answers import generate_answers
from graftlm.objectives.seq2seq import choose_path, logits_of
from graftlm.objectives.sft import rows_per_chunk


@dataclass(frozen=True)
class Asking:
    """How held-out rows are answered: which of them, by how wide a beam search (1: greedily)."""

    rows: Sequence[int]
    num_beams: int = 1


def pair_losses(
    model: nn.Module,
    rows: Sequence[Pair],
    *,
    rows_per_batch: int = 16,
    tokens_per_batch: int = 8192,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> RowLosses:
    """Loss sums of `model` as it stands (active adapters included) on the targets of `rows`, unsmoothed.

    Longest rows first, so that memory peaks at the start; a batch that does not fit the device is halved.
    """
    path, why = choose_path(model, 0.0)
    found: dict[int, RowLoss] = {}

    def measure(some: Sequence[Pair]) -> list[float]:
        return _sums(model, some, is_whole=path == "full logits")

    with evaluation_mode(model):
        for batch in longest_first(
            [row.tokens for row in rows], tokens=tokens_per_batch, rows=rows_per_batch
        ):
            if should_stop is not None and should_stop():
                break
            sums = halving(measure, [rows[index] for index in batch])
            for index, value in zip(batch, sums, strict=True):
                found[index] = RowLoss(index, value, rows[index].target_tokens)
            if progress is not None:
                progress(len(found), len(rows))
    ordered = tuple(found[index] for index in sorted(found))
    said = f"full logits: {why}" if path == "full logits" else "head in chunks"
    return RowLosses(ordered, len(found) == len(rows), said)


def evaluate_pairs(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Pair],
    asking: Asking,
    *,
    name: str,
    progress: Progress,
    should_stop: StopFlag,
) -> Evaluation:
    """Measure `model` as it stands: the loss of every row, and what it writes to those that are asked.

    Raises:
        DataError: a loss that is not finite.
    """
    started, total = time.monotonic(), len(rows) + len(asking.rows)
    losses = pair_losses(model, rows, progress=lambda done, _: progress(done, total), should_stop=should_stop)
    answers: dict[int, tuple[str, str, str]] = {}
    complete = losses.complete
    if asking.rows and complete:
        written = _answers(
            model,
            tokenizer,
            [rows[index] for index in asking.rows],
            asking.num_beams,
            progress=lambda done, _: progress(len(rows) + done, total),
            should_stop=should_stop,
        )
        complete = all(each.finish != "cancelled" for each in written)
        answers = {
            index: _texts(tokenizer, rows[index], each)
            for index, each in zip(asking.rows, written, strict=True)
            if each.finish != "cancelled"
        }
    done = tuple(
        EvaluatedRow(
            rows[each.index].row,
            rows[each.index].digest,
            each.loss_sum,
            each.tokens,
            *answers.get(each.index, (None, None, None)),
        )
        for each in losses.rows
    )
    require_finite(name, done)
    return Evaluation(name, done, time.monotonic() - started, complete, losses.path)


def _answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Pair],
    num_beams: int,
    *,
    progress: Progress,
    should_stop: StopFlag,
) -> list[Generated]:
    room = min(LONGEST, max(row.target_tokens for row in rows)) + MARGIN
    return generate_answers(
        model,
        [row.source for row in rows],
        max_new_tokens=room,
        stop_ids=stop_token_ids(model, tokenizer),
        num_beams=num_beams,
        progress=progress,
        should_stop=should_stop,
    )


def _texts(tokenizer: Any, row: Pair, written: Generated) -> tuple[str, str, str]:
    """Source, prediction and reference, as text."""
    return row.text, decode(tokenizer, written.token_ids), decode(tokenizer, row.target)


def _sums(model: Any, rows: Sequence[Pair], *, is_whole: bool) -> list[float]:
    """Loss sum of every row, in float64; logits exist for one chunk of positions at a time."""
    batch = padded(rows, 0, longest(rows))
    inputs = {name: value.to(input_device(model)) for name, value in batch.inputs.items()}
    logits = None if is_whole else logits_of(model)
    states: Tensor = model(**inputs, use_cache=False).logits if is_whole else head_input(model, inputs)
    vocabulary = states.shape[-1] if logits is None else logits(states[:1, :1]).shape[-1]
    labels = batch.labels.to(states.device)
    where = labels != IGNORED
    kept, wanted, owner = states[where], labels[where], where.nonzero()[:, 0].cpu()
    sums = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    size = rows_per_chunk(vocabulary)
    for part, target, line in zip(kept.split(size), wanted.split(size), owner.split(size), strict=True):
        found = part if logits is None else logits(part)
        losses = F.cross_entropy(found.float(), target, reduction="none")
        sums.index_add_(0, line, losses.double().cpu())
    return [float(value) for value in sums]
