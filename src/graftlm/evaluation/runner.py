"""One model measured on one set of rows: loss of every row, and answers where rows have prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from graftlm.core.allocation import return_freed
from graftlm.core.errors import DataError
from graftlm.evaluation.metrics import Share, exact_match, perplexity, share_of
from graftlm.evaluation.perplexity import row_losses
from graftlm.evaluation.rows import TokenRow, digest
from graftlm.evaluation.tasks import Answer, answerable, answers
from graftlm.models.generate import Progress, StopFlag


@dataclass(frozen=True)
class EvaluatedRow:
    """One row's figures. `digest` is of its ids and labels; texts are None where no answer was asked for."""

    row: int
    digest: str
    loss_sum: float
    tokens: int
    prompt: str | None = None
    prediction: str | None = None
    reference: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    """What a task measures besides: the margin of a pair, the length of an answer. By the measure's name."""

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.loss_sum / self.tokens

    @property
    def matches(self) -> bool | None:
        """Exact match, or None without an answer."""
        if self.prediction is None or self.reference is None:
            return None
        return exact_match(self.prediction, self.reference)


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one model: rows in the order given.

    `complete` is False when the stop flag ended it early; such a result cannot be compared. `logits_path`
    says how logits were formed (see `RowLosses.path`).
    """

    name: str
    rows: tuple[EvaluatedRow, ...]
    seconds: float
    complete: bool
    logits_path: str
    measures: tuple[str, ...] = ()
    """What the task is judged by, the first before all others (see `evaluation.measures`)."""
    labels: tuple[str, ...] = ()
    """Where predictions and references are names of labels: all of them, in order."""
    loss_title: str = "Held-out loss"
    """What the loss is called; empty where it says nothing that a measure does not say."""

    @property
    def tokens(self) -> int:
        """Target tokens in all."""
        return sum(row.tokens for row in self.rows)

    @property
    def loss(self) -> float:
        """Token-weighted mean loss in nats."""
        return sum(row.loss_sum for row in self.rows) / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return perplexity(self.loss)

    @property
    def exact_match(self) -> Share | None:
        """Share of answered rows whose prediction is the reference; None when none was answered."""
        flags = [row.matches for row in self.rows if row.matches is not None]
        return share_of(flags) if flags else None

    def to_json(self) -> str:
        """One JSON object; `Evaluation.from_json` reads it back."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read `to_json`'s text.

        Raises:
            DataError: it is not an evaluation.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise DataError(
                f"This is not an evaluation: {error.error_count()} fields are missing or wrong.",
                fix="Give a file that `graft eval` wrote.",
            ) from None


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[TokenRow],
    *,
    name: str,
    most_answers: int | None = 128,
    rows_per_batch: int = 16,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> Evaluation:
    """Measure `model` as it stands on `rows`.

    Every row gets its loss. Rows with a prompt are also answered by greedy generation: `most_answers` of
    them, evenly spread (None: all, 0: none). `progress` is called with (rows done, rows in all) over both
    passes.

    Raises:
        DataError: no rows, rows without targets, or a loss that is not finite.
        ModelError: rows beyond the model's context, or an encoder-decoder model.
    """
    started = time.monotonic()
    asked = answerable(rows, most_answers)
    total = len(rows) + len(asked)
    losses = row_losses(
        model,
        rows,
        rows_per_batch=rows_per_batch,
        progress=_offset(progress, 0, total),
        should_stop=should_stop,
    )
    return_freed()  # the blocks of an answer have other sizes
    given: tuple[Answer, ...] = ()
    complete = losses.complete
    if asked and complete:
        found = answers(
            model,
            tokenizer,
            rows,
            asked,
            rows_per_batch=rows_per_batch,
            progress=_offset(progress, len(rows), total),
            should_stop=should_stop,
        )
        given, complete = found.rows, found.complete
    by_index = {answer.index: answer for answer in given}
    done = tuple(
        _row(rows[loss.index], loss.loss_sum, loss.tokens, by_index.get(loss.index)) for loss in losses.rows
    )
    require_finite(name, done)
    return Evaluation(name, done, time.monotonic() - started, complete, losses.path)


def _row(row: TokenRow, loss_sum: float, tokens: int, answer: Answer | None) -> EvaluatedRow:
    if answer is None:
        return EvaluatedRow(row.row, digest(row), loss_sum, tokens)
    texts = (answer.prompt, answer.prediction, answer.reference)
    return EvaluatedRow(row.row, digest(row), loss_sum, tokens, *texts)


def _offset(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _total: progress(before + done, total)


def require_finite(name: str, rows: Sequence[EvaluatedRow]) -> None:
    """Raises:
    DataError: the loss of a row overflowed, or is no number.
    """
    bad = [f"row {row.row}: loss {row.loss_sum}" for row in rows if not abs(row.loss_sum) < float("inf")]
    if bad:
        raise DataError(
            f"{name}: the loss of {len(bad)} of {len(rows)} rows is not finite.",
            problems=bad[:20],
            meaning="The model overflows (often float16), or its adapter holds NaN.",
            fix="Load the model with dtype bfloat16 or float32, or go back to an earlier checkpoint.",
        )
