"""KTO: answers marked good or bad; preference pairs give one of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.core.notices import notice
from graftlm.core.seeding import derived_seed
from graftlm.data.formats import detect
from graftlm.data.preferences.check import mark_findings
from graftlm.data.preferences.encode import MarkedRow, encode_marked
from graftlm.data.preferences.records import Marked
from graftlm.data.preferences.rows import to_marked
from graftlm.data.row_batches import RowBatches
from graftlm.evaluation.divergence import first_answer_divergences, is_base, without_adapters
from graftlm.evaluation.rows import TokenRow
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.generate import Progress, StopFlag
from graftlm.objectives.kto import KtoObjective, KtoSettings, MarkedBatch, marked_batch, marked_metrics
from graftlm.objectives.sft import require_causal
from graftlm.tasks.base import spread
from graftlm.tasks.dataset import Converted, kept
from graftlm.tasks.pair_measures import (
    digest_of,
    during_training,
    ids_of,
    prompts_of,
    require_finite,
)
from graftlm.tasks.preference import UNPACKED, say_ignored
from graftlm.tasks.records import RecordTask
from graftlm.tasks.reference import Reference, answer_sums, reference_of, rows_to_come
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked
from graftlm.training.recipe import Recipe

MEASURES = ("good_above_bad", "mark_margin", "kl")


def to_marks(
    rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
) -> Converted[Marked]:
    """Marked answers; of preference pairs both answers."""
    found = detect(rows, format)
    records, problems = to_marked(rows, found, numbers, source)
    return Converted(records, found, problems)


class KtoTask(RecordTask[Marked, MarkedRow, MarkedBatch]):
    """A policy that makes good answers likelier, and bad ones less likely."""

    name = "kto"
    unpacked = UNPACKED
    rate_scale: ClassVar[float] = 0.1

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._reference: Reference | None = None
        self._objective: KtoObjective
        self._batches: RowBatches[MarkedRow, MarkedBatch]

    @property
    def settings(self) -> KtoSettings:
        settings = self.recipe.task.settings
        assert isinstance(settings, KtoSettings)
        return settings

    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[Marked]:
        return to_marks(rows, format, numbers, source)

    def look(self) -> None:
        weights = self.settings.desirable_weight, self.settings.undesirable_weight
        for finding in mark_findings(self.raw.train, *weights):
            notice(str(finding))

    def settled(self) -> Recipe:
        say_ignored(self.recipe)
        return super().settled()

    def require_base(self, model: nn.Module) -> None:
        require_causal(model)

    def encoded(self, records: Sequence[Marked], tokenizer: Any, part: str) -> tuple[MarkedRow, ...]:
        data = self.recipe.data
        found = encode_marked(records, tokenizer, data.max_length, data.template)
        rows = kept(found.rows, found.problems, data, part)
        if self.settings.loss_type != "kto":
            return rows
        return with_partners(rows, data.max_length, self.recipe.train.seed)

    def batches(self, tokenizer: Any) -> RowBatches[MarkedRow, MarkedBatch]:
        train = self.recipe.train
        self._batches = RowBatches(
            self.dataset.train,
            partial(self._batch, pad=tokenizer.pad_token_id),
            ids=lambda row: [int(row.is_good), *ids_of(row.branched)],
            rows_per_batch=train.per_device_train_batch_size,
            seed=train.seed,
        )
        return self._batches

    def _batch(self, rows: Sequence[MarkedRow], pad: int) -> MarkedBatch:
        """Before `begin` the policy is its own reference."""
        return marked_batch(rows, pad, self._known(rows))

    def _known(self, rows: Sequence[MarkedRow]) -> Tensor | None:
        return None if self._reference is None else self._reference.of([row.branched for row in rows])

    def objective(self, model: nn.Module) -> KtoObjective:
        self._objective = KtoObjective(model, self.settings)
        return self._objective

    def begin(self, model: nn.Module, adapters: AdapterSet, run: Path, stop: StopFlag) -> None:
        rows = [*rows_to_come(self._batches, self.recipe.train), *during_training(self.dataset.held_out)]
        plain = [row.branched for row in rows]
        self._reference = reference_of(model, self._objective.log_probs, plain, run, stop)

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        rows = during_training(self.dataset.held_out)
        return HeldOutMarked(model, self._objective, rows, self._known(rows))

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        rows, objective = self.dataset.held_out, KtoObjective(model, self.settings)
        return measure_marked(model, objective, rows, name=name, progress=progress, stop=stop)

    def probes(self, count: int) -> list[list[int]]:
        rows = spread([row.branched for row in self.dataset.held_out], count)
        return [[*row.prompt, *row.answers[0]] for row in rows]

    @property
    def openings(self) -> Sequence[TokenRow]:
        return prompts_of([row.branched for row in self.dataset.held_out])

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        rows = self.dataset.train or self.dataset.held_out
        good = sum(row.is_good for row in rows)
        return [("Answers marked", f"{good:,} good, {len(rows) - good:,} bad")]


def with_partners(rows: Sequence[MarkedRow], max_length: int, seed: int) -> tuple[MarkedRow, ...]:
    """Each row with another row's answer beside its own, as far as that fits; drawn once, by the seed.

    >>> from graftlm.data.branches import Branched
    >>> rows = [MarkedRow(Branched((1, 2), ((n,),), n, False), True) for n in (5, 6)]
    >>> [row.branched.answers for row in with_partners(rows, 8, seed=0)]
    [((5,), (6,)), ((6,), (5,))]
    """
    if len(rows) < 2:
        return tuple(rows)
    generator = torch.Generator().manual_seed(derived_seed("kto partners", seed))
    order = torch.randperm(len(rows), generator=generator).tolist()
    partner = dict(zip(order, [*order[1:], order[0]], strict=True))
    found = []
    for place, row in enumerate(rows):
        own = row.branched
        other = rows[partner[place]].branched.answers[0][: max_length - len(own.prompt)]
        found.append(replace(row, branched=replace(own, answers=(own.answers[0], other))))
    return tuple(found)


class HeldOutMarked:
    """The loss on held-out answers while training, with its figures."""

    def __init__(
        self, model: nn.Module, objective: KtoObjective, rows: Sequence[MarkedRow], reference: Tensor | None
    ) -> None:
        self.model, self.objective, self.rows, self.reference = model, objective, rows, reference

    def __call__(self, stop: StopAsked) -> HeldOut | None:
        rows = [row.branched for row in self.rows]
        log_probs = self.objective.log_probs
        sums = answer_sums(self.model, log_probs, rows, progress=lambda _done, _all: None, stop=stop)
        if sums.isnan().any():
            return None
        marks = marks_of(self.rows)
        judged = self.objective.judge(sums, marks, sums if self.reference is None else self.reference)
        return HeldOut(float(judged.losses.mean()), len(rows), len(rows), marked_metrics(judged, marks))


def measure_marked(
    model: nn.Module,
    objective: KtoObjective,
    rows: Sequence[MarkedRow],
    *,
    name: str,
    progress: Progress,
    stop: StopFlag,
) -> Evaluation:
    """Loss, reward and KL to the base of every answer.

    Raises:
        DataError: a loss is not finite.
    """
    started, plain = time.monotonic(), [row.branched for row in rows]
    sums = answer_sums(model, objective.log_probs, plain, progress=progress, stop=stop)
    reference = sums
    if not is_base(model):
        with without_adapters(model):
            reference = answer_sums(model, objective.log_probs, plain, progress=progress, stop=stop)
    judged = objective.judge(sums.double(), marks_of(rows).double(), reference.double())
    require_finite(name, plain, judged.losses)
    divergences = first_answer_divergences(model, plain, progress=progress, should_stop=stop)
    found = tuple(
        EvaluatedRow(
            row.row,
            digest_of(row.branched),
            loss,
            1,
            figures={"reward": reward, "is_good": float(row.is_good), "kl": divergence},
        )
        for row, loss, reward, divergence in zip(
            rows, judged.losses.tolist(), judged.rewards.tolist(), divergences, strict=True
        )
    )
    return Evaluation(name, found, time.monotonic() - started, True, objective.path, MEASURES)


def marks_of(rows: Sequence[MarkedRow]) -> Tensor:
    """1 for good, 0 for bad. Shape: [rows], float32."""
    return torch.tensor([float(row.is_good) for row in rows])
