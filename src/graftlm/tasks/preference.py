"""Preference pairs: DPO and its relatives, IPO, SimPO and ORPO. They differ in the loss alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from graftlm.core.notices import notice
from graftlm.data.branches import Branched
from graftlm.data.formats import detect
from graftlm.data.preferences.check import length_facts, pair_findings
from graftlm.data.preferences.encode import encode_preferences
from graftlm.data.preferences.records import Preference
from graftlm.data.preferences.rows import to_preferences
from graftlm.data.row_batches import RowBatches
from graftlm.evaluation.rows import TokenRow
from graftlm.evaluation.runner import Evaluation
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.generate import Progress, StopFlag
from graftlm.objectives.preference import (
    DpoObjective,
    DpoSettings,
    PairBatch,
    PairObjective,
    pair_batch,
)
from graftlm.objectives.reference_free import OrpoObjective, OrpoSettings, SimpoObjective, SimpoSettings
from graftlm.objectives.sft import require_causal
from graftlm.tasks.base import spread
from graftlm.tasks.dataset import Converted, kept
from graftlm.tasks.pair_measures import HeldOutPairs, during_training, ids_of, measure_pairs, prompts_of
from graftlm.tasks.records import RecordTask
from graftlm.tasks.reference import Reference, reference_of, rows_to_come
from graftlm.training.interfaces import Evaluate
from graftlm.training.recipe import Recipe

UNPACKED = "a prompt and its answers are a line of their own"


def to_pairs(
    rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
) -> Converted[Preference]:
    """Preference pairs, in any of the known shapes."""
    found = detect(rows, format)
    pairs, problems = to_preferences(rows, found, numbers, source)
    return Converted(pairs, found, problems)


def say_ignored(recipe: Recipe) -> None:
    """What a recipe asks for and a task on judged answers does not read."""
    if recipe.data.train_on != "completion":
        notice(f"data.train_on: {recipe.data.train_on} has no effect: judged are answers, not prompts.")
    if recipe.eval.metrics != "auto":
        notice(f"eval.metrics has no effect: {recipe.task.type} is measured by its rewards.")


class PreferenceTask(RecordTask[Preference, Branched, PairBatch]):
    """A policy that makes the chosen answer likelier than the rejected one."""

    unpacked = UNPACKED
    rate_scale: ClassVar[float] = 0.1
    """Preferences want a tenth of the learning rate of imitation: nothing else holds the policy to text."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._reference: Reference | None = None
        self._objective: PairObjective
        self._batches: RowBatches[Branched, PairBatch]

    @abstractmethod
    def loss(self, model: nn.Module) -> PairObjective:
        """The loss on this model as it stands."""

    def objective(self, model: nn.Module) -> PairObjective:
        self._objective = self.loss(model)
        return self._objective

    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[Preference]:
        return to_pairs(rows, format, numbers, source)

    def look(self) -> None:
        for finding in pair_findings(self.raw.train):
            notice(str(finding))

    def settled(self) -> Recipe:
        say_ignored(self.recipe)
        return super().settled()

    def require_base(self, model: nn.Module) -> None:
        require_causal(model)

    def encoded(self, records: Sequence[Preference], tokenizer: Any, part: str) -> tuple[Branched, ...]:
        data = self.recipe.data
        found = encode_preferences(records, tokenizer, data.max_length, data.template)
        return kept(found.rows, found.problems, data, part)

    def batches(self, tokenizer: Any) -> RowBatches[Branched, PairBatch]:
        train = self.recipe.train
        self._batches = RowBatches(
            self.dataset.train,
            partial(self._batch, pad=tokenizer.pad_token_id),
            ids=ids_of,
            rows_per_batch=train.per_device_train_batch_size,
            seed=train.seed,
        )
        return self._batches

    def _batch(self, rows: Sequence[Branched], pad: int) -> PairBatch:
        """Before `begin` the policy is its own reference."""
        return pair_batch(rows, pad, None if self._reference is None else self._reference.of(rows))

    def begin(self, model: nn.Module, adapters: AdapterSet, run: Path, stop: StopFlag) -> None:
        objective = self._objective
        if objective.needs_reference:
            to_come = rows_to_come(self._batches, self.recipe.train)
            rows = [*to_come, *during_training(self.dataset.held_out)]
            self._reference = reference_of(model, objective.log_probs, rows, run, stop)

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        rows = during_training(self.dataset.held_out)
        reference = None if self._reference is None else self._reference.of(rows)
        return HeldOutPairs(model, self._objective, rows, reference)

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        rows, objective = self.dataset.held_out, self.loss(model)
        return measure_pairs(model, objective, rows, name=name, progress=progress, stop=stop)

    def probes(self, count: int) -> list[list[int]]:
        return [[*row.prompt, *row.answers[0]] for row in spread(self.dataset.held_out, count)]

    @property
    def openings(self) -> Sequence[TokenRow]:
        return prompts_of(self.dataset.held_out)

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        return length_facts(self.dataset.train or self.dataset.held_out)


class DpoTask(PreferenceTask):
    """Direct preference optimisation."""

    name = "dpo"

    def loss(self, model: nn.Module) -> PairObjective:
        settings = self.recipe.task.settings
        assert isinstance(settings, DpoSettings)
        return DpoObjective(model, settings)


class IpoTask(DpoTask):
    """Identity preference optimisation."""

    name = "ipo"


class SimpoTask(PreferenceTask):
    """SimPO: mean log-probabilities with a margin, no reference."""

    name = "simpo"

    def loss(self, model: nn.Module) -> PairObjective:
        settings = self.recipe.task.settings
        assert isinstance(settings, SimpoSettings)
        return SimpoObjective(model, settings)


class OrpoTask(PreferenceTask):
    """ORPO: imitation and an odds ratio, no reference."""

    name = "orpo"

    def loss(self, model: nn.Module) -> PairObjective:
        settings = self.recipe.task.settings
        assert isinstance(settings, OrpoSettings)
        return OrpoObjective(model, settings)
