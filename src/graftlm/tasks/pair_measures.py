"""Held-out pairs, measured while training and before and after it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from graftlm.core.errors import DataError
from graftlm.data.branches import Branched
from graftlm.evaluation.divergence import first_answer_divergences, is_base, without_adapters
from graftlm.evaluation.rows import IGNORED, TokenRow, Tokens
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.models.generate import Progress, StopFlag
from graftlm.objectives.preference import PairObjective, pair_metrics, right
from graftlm.tasks.reference import answer_sums
from graftlm.training.interfaces import HeldOut, StopAsked

ROWS_DURING_TRAINING = 512


class HeldOutPairs:
    """The loss on held-out pairs while training, with the figures of pairs."""

    def __init__(
        self, model: nn.Module, objective: PairObjective, rows: Sequence[Branched], reference: Tensor | None
    ) -> None:
        self.model, self.objective, self.rows, self.reference = model, objective, rows, reference

    def __call__(self, stop: StopAsked) -> HeldOut | None:
        sums = answer_sums(
            self.model, self.objective.log_probs, self.rows, progress=lambda _done, _all: None, stop=stop
        )
        if sums.isnan().any():
            return None
        reference = sums if self.reference is None else self.reference
        judged = self.objective.judge(sums, lengths_of(self.rows), reference)
        metrics = pair_metrics(judged.rewards, sums)
        return HeldOut(float(judged.losses.mean()), len(self.rows), len(self.rows), metrics)


def measure_pairs(
    model: nn.Module,
    objective: PairObjective,
    rows: Sequence[Branched],
    *,
    name: str,
    progress: Progress,
    stop: StopFlag,
) -> Evaluation:
    """Loss, reward accuracy, reward margin and KL to the base of every pair.

    Raises:
        DataError: a loss is not finite.
    """
    started = time.monotonic()
    sums = answer_sums(model, objective.log_probs, rows, progress=progress, stop=stop)
    reference = sums
    if objective.needs_reference and not is_base(model):
        with without_adapters(model):
            reference = answer_sums(model, objective.log_probs, rows, progress=progress, stop=stop)
    judged = objective.judge(sums.double(), lengths_of(rows).double(), reference.double())
    require_finite(name, rows, judged.losses)
    divergences = first_answer_divergences(model, rows, progress=progress, should_stop=stop)
    chosen, rejected = judged.rewards.unbind(1)
    figures = zip(
        judged.losses.tolist(),
        right(chosen, rejected).tolist(),
        (chosen - rejected).tolist(),
        divergences,
        strict=True,
    )
    found = tuple(
        EvaluatedRow(
            row.row,
            digest_of(row),
            loss,
            1,
            figures={"reward_accuracy": accuracy, "reward_margin": margin, "kl": divergence},
        )
        for row, (loss, accuracy, margin, divergence) in zip(rows, figures, strict=True)
    )
    measures = ("reward_accuracy", "reward_margin", "kl")
    return Evaluation(name, found, time.monotonic() - started, True, objective.path, measures)


R = TypeVar("R")


def during_training(rows: Sequence[R]) -> list[R]:
    """At most `ROWS_DURING_TRAINING` held-out rows, evenly spread."""
    return list(rows)[:: -(-len(rows) // ROWS_DURING_TRAINING)]


def lengths_of(rows: Sequence[Branched]) -> Tensor:
    """Tokens of the answers. Shape: [rows, answers], float32."""
    return torch.tensor([[float(len(answer)) for answer in row.answers] for row in rows])


def ids_of(row: Branched) -> list[int]:
    """All of a row, with where its parts end."""
    parts = (row.prompt, *row.answers)
    return [row.row, *map(len, parts), *chain.from_iterable(parts)]


def digest_of(row: Branched) -> str:
    """SHA-256 (16 hex digits) of prompt and answers."""
    return hashlib.sha256(str(ids_of(row)[1:]).encode()).hexdigest()[:16]


def prompts_of(rows: Sequence[Branched]) -> list[TokenRow]:
    """The prompts alone."""
    return [Tokens(row.prompt, (IGNORED,) * len(row.prompt), row.row) for row in rows]


def require_finite(name: str, rows: Sequence[Branched], losses: Tensor) -> None:
    """Refuse losses that are no numbers.

    Raises:
        DataError: with the rows they belong to.
    """
    bad = [row.row for row, is_good in zip(rows, losses.isfinite().tolist(), strict=True) if not is_good]
    if bad:
        raise DataError(
            f"{name}: the loss of {len(bad)} of {len(rows)} rows is not finite.",
            problems=[f"row {row}" for row in bad[:20]],
            meaning="The model overflows (often float16), or its adapter holds NaN.",
            fix="Load the model with dtype bfloat16 or float32, or go back to an earlier checkpoint.",
        )
