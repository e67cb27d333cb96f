"""A classifier measured on labelled rows: what it tells of each, and the loss of that."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graftlm.data.batches import Batch
from graftlm.data.labels.encode import LabelledRow, TaggedRow, collate_labelled, collate_tagged
from graftlm.data.labels.records import JOINED
from graftlm.data.labels.values import Problem
from graftlm.data.longest_first import longest_first
from graftlm.evaluation.label_scores import spans
from graftlm.evaluation.runner import EvaluatedRow, Evaluation, require_finite
from graftlm.models.generate import Progress, StopFlag, evaluation_mode, input_device
from graftlm.objectives.classification import row_losses
from graftlm.objectives.row_logits import RowLogits
from graftlm.objectives.token_classification import token_losses

ROWS, TOKENS = 32, 8192
"""Of one pass, at most."""
SHOWN = 400
"""Characters of a text that are kept for people."""

MEASURES: dict[Problem, tuple[str, ...]] = {
    "one label": ("accuracy", "macro_f1", "mcc"),
    "several labels": ("micro_f1", "accuracy"),
    "number": ("pearson", "spearman", "mse"),
}
"""What each is judged by, the first before all others."""
TAG_MEASURES = ("span_f1", "token_accuracy")


@dataclass(frozen=True)
class Labels:
    """What there is to tell: the names of the labels, in order, and how many of them hold at a time."""

    names: tuple[str, ...]
    told: Problem


def evaluate_labelled(
    model: nn.Module,
    rows: Sequence[LabelledRow],
    labels: Labels,
    *,
    name: str,
    pad: int,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> Evaluation:
    """What the model as it stands tells of `rows`. Of several labels those count that are likelier than not.

    Raises:
        DataError: a loss is not finite.
    """
    most = max(row.tokens for row in rows)

    def measure(logits: RowLogits, some: Sequence[LabelledRow]) -> list[EvaluatedRow]:
        batch = collate_labelled(some, pad, most, labels.told)
        found = logits(model, _there(batch, model))
        losses = row_losses(found, batch.targets, labels.told).double().tolist()
        said = found.float().cpu()
        return [_told(*each, labels) for each in zip(some, said, losses, strict=True)]

    found = _evaluate(model, rows, measure, name, MEASURES[labels.told], progress, should_stop)
    if labels.told == "number":
        return replace(found, loss_title="")  # it is the squared error, which is shown by its name
    return replace(found, labels=labels.names) if labels.told == "one label" else found


def evaluate_tagged(
    model: nn.Module,
    rows: Sequence[TaggedRow],
    tags: Sequence[str],
    *,
    name: str,
    pad: int,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> Evaluation:
    """What tags the model as it stands tells; the loss of a row is the sum over its words.

    Raises:
        DataError: a loss is not finite.
    """
    most = max(row.tokens for row in rows)

    def measure(logits: RowLogits, some: Sequence[TaggedRow]) -> list[EvaluatedRow]:
        batch = collate_tagged(some, pad, most)
        found = logits(model, _there(batch, model))
        counts = [row.target_tokens for row in some]
        losses = token_losses(found, batch.labels).double().cpu().split(counts)
        said = found.argmax(-1).cpu().split(counts)
        return [_tagged(*each, tags) for each in zip(some, said, losses, strict=True)]

    return _evaluate(model, rows, measure, name, TAG_MEASURES, progress, should_stop)


def _evaluate(
    model: nn.Module,
    rows: Sequence[LabelledRow] | Sequence[TaggedRow],
    measure: Callable[..., list[EvaluatedRow]],
    name: str,
    measures: tuple[str, ...],
    progress: Progress | None,
    should_stop: StopFlag | None,
) -> Evaluation:
    started = time.monotonic()
    logits = RowLogits(model)
    found: dict[int, EvaluatedRow] = {}
    with evaluation_mode(model):
        for some in longest_first([row.tokens for row in rows], tokens=TOKENS, rows=ROWS):
            if should_stop is not None and should_stop():
                break
            found.update(zip(some, measure(logits, [rows[index] for index in some]), strict=True))
            if progress is not None:
                progress(len(found), len(rows))
    done = tuple(found[index] for index in sorted(found))
    require_finite(name, done)
    complete = len(found) == len(rows)
    return Evaluation(name, done, time.monotonic() - started, complete, logits.path, measures)


def _there(batch: Batch, model: nn.Module) -> Batch:
    """The batch with its inputs where the model reads them."""
    device = input_device(model)
    return replace(batch, inputs={name: tensor.to(device) for name, tensor in batch.inputs.items()})


def _told(row: LabelledRow, logits: Tensor, loss: float, labels: Labels) -> EvaluatedRow:
    """One row with one label, several, or a number."""
    record, target = row.record, torch.tensor(row.target)
    if labels.told == "number":
        value = float(logits[0])
        figures = {"predicted_value": value, "actual_value": row.target[0]}
        prediction = f"{value:.4g}"
    elif labels.told == "several labels":
        said = logits > 0
        hits = float((said & (target > 0)).sum())
        is_right = bool((said == (target > 0)).all())
        figures = {"accuracy": float(is_right), "hits": hits, "told": float(said.sum())}
        figures["wanted"] = float(target.sum())
        prediction = JOINED.join(name for name, one in zip(labels.names, said.tolist(), strict=True) if one)
    else:
        best, actual = int(logits.argmax()), int(target.argmax())
        figures = {"accuracy": float(best == actual), "predicted": float(best), "actual": float(actual)}
        prediction = labels.names[best]
    identity = _digest(row.input_ids, row.target)
    text = record.text[:SHOWN]
    return EvaluatedRow(record.row, identity, loss, 1, text, prediction, record.answer, figures)


def _tagged(row: TaggedRow, said: Tensor, losses: Tensor, tags: Sequence[str]) -> EvaluatedRow:
    wanted = [tags[label] for label in row.labels if label >= 0]
    told = [tags[label] for label in said.tolist()]
    ours, theirs = spans(told), spans(wanted)
    right = sum(one == other for one, other in zip(told, wanted, strict=True))
    figures = {"hits": len(ours & theirs), "told": len(ours), "wanted": len(theirs), "right_words": right}
    figures["words_told"] = len(wanted)
    numbers = {key: float(value) for key, value in figures.items()}
    texts = (row.record.text[:SHOWN], " ".join(told)[:SHOWN], " ".join(wanted)[:SHOWN])
    identity = _digest(row.input_ids, row.labels)
    return EvaluatedRow(row.row, identity, float(losses.sum()), len(wanted), *texts, numbers)


def _digest(ids: Sequence[int], target: Sequence[float]) -> str:
    return hashlib.sha256(f"{list(ids)}|{list(target)}".encode()).hexdigest()[:16]
