"""Reward model: an adapter and a head that tell the better answer, from pairs that people judged."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.notices import notice
from graftlm.data.branches import Branched
from graftlm.data.longest_first import longest_first
from graftlm.data.preferences.check import length_facts, pair_findings
from graftlm.data.preferences.encode import encode_preferences
from graftlm.data.preferences.records import Preference
from graftlm.data.row_batches import RowBatches
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.methods.base import MethodConfig
from graftlm.models.ending import Ending
from graftlm.models.generate import Progress, StopFlag, evaluation_mode
from graftlm.models.heads import with_head
from graftlm.objectives.preference import right
from graftlm.objectives.reward import (
    RewardBatch,
    RewardObjective,
    RewardSettings,
    pair_losses,
    reward_batch,
    reward_metrics,
)
from graftlm.objectives.sft import require_causal
from graftlm.quant.facts import device_of
from graftlm.tasks.base import spread
from graftlm.tasks.dataset import Converted, kept
from graftlm.tasks.pair_measures import digest_of, during_training, ids_of, require_finite
from graftlm.tasks.preference import UNPACKED, to_pairs
from graftlm.tasks.records import RecordTask
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked
from graftlm.training.step import to_device

REWARD = "reward"
"""What the one number of the head is called."""
TOKENS_PER_BATCH = 8192
MEASURES = ("reward_accuracy", "reward_margin")


@dataclass(frozen=True, slots=True)
class RewardRow:
    """A pair in tokens: the answers are (chosen, rejected)."""

    pair: Branched
    margin: float

    @property
    def row(self) -> int:
        """Its number in the data."""
        return self.pair.row

    @property
    def tokens(self) -> int:
        """Of the prompt, once, and of both answers."""
        return self.pair.tokens

    @property
    def target_tokens(self) -> int:
        """One thing is told of a pair."""
        return 1

    @property
    def truncated(self) -> bool:
        """Whether something was cut off to fit."""
        return self.pair.truncated

    @property
    def ids(self) -> list[int]:
        """Whole numbers that tell the row from every other."""
        return [*ids_of(self.pair), *struct.unpack("<q", struct.pack("<d", self.margin))]


class RewardTask(RecordTask[Preference, RewardRow, RewardBatch]):
    """A number for each answer, higher for the chosen one of a pair."""

    name = "reward"
    keeps_known_text = False
    unpacked = UNPACKED

    @property
    def settings(self) -> RewardSettings:
        """What the recipe says of the task."""
        settings = self.recipe.task.settings
        assert isinstance(settings, RewardSettings)
        return settings

    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[Preference]:
        return to_pairs(rows, format, numbers, source)

    def look(self) -> None:
        for finding in pair_findings(self.raw.train):
            notice(str(finding))

    @property
    def ending(self) -> Ending:
        return Ending("rows", (REWARD,), "number", self.recipe.train.seed)

    def require_base(self, model: nn.Module) -> None:
        require_causal(model)

    def encode(self, tokenizer: Any) -> None:
        self._pad = int(tokenizer.pad_token_id)
        super().encode(tokenizer)

    def encoded(self, records: Sequence[Preference], tokenizer: Any, part: str) -> tuple[RewardRow, ...]:
        data = self.recipe.data
        margins = {pair.row: pair.margin or 0.0 for pair in records}
        found = encode_preferences(records, tokenizer, data.max_length, data.template)
        rows = tuple(RewardRow(row, margins[row.row]) for row in found.rows)
        return kept(rows, found.problems, data, part)

    def method(self, model: nn.Module) -> MethodConfig:
        return with_head(self.recipe.method.config, model)

    def batches(self, tokenizer: Any) -> RowBatches[RewardRow, RewardBatch]:
        train = self.recipe.train
        return RowBatches(
            self.dataset.train,
            partial(_batch, pad=self._pad),
            ids=lambda row: row.ids,
            rows_per_batch=train.per_device_train_batch_size,
            seed=train.seed,
        )

    def objective(self, model: nn.Module) -> RewardObjective:
        return RewardObjective(model, self.settings)

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        return HeldOutRewards(model, self.objective(model), during_training(self.dataset.held_out), self._pad)

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        rows, objective = self.dataset.held_out, self.objective(model)
        rewards = pair_rewards(model, objective, rows, self._pad, progress=progress, stop=stop)
        complete = not bool(rewards.isnan().any())
        losses = objective_losses(objective, rows, rewards)
        require_finite(name, [row.pair for row in rows], losses)
        margins = (rewards[:, 0] - rewards[:, 1]).tolist()
        figures = zip(losses.tolist(), right(*rewards.unbind(1)).tolist(), margins, strict=True)
        found = tuple(
            EvaluatedRow(
                row.row, digest_of(row.pair), loss, 1,
                figures={"reward_accuracy": accuracy, "reward_margin": margin},
            )
            for row, (loss, accuracy, margin) in zip(rows, figures, strict=True)
        )  # fmt: skip
        return Evaluation(name, found, 0.0, complete, objective.path, MEASURES)

    def probes(self, count: int) -> list[list[int]]:
        return [[*row.pair.prompt, *row.pair.answers[0]] for row in spread(self.dataset.held_out, count)]

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        rows = self.dataset.train or self.dataset.held_out
        with_margin = sum(row.margin != 0 for row in rows)
        margins = [("pairs with a margin", f"{with_margin:,} of {len(rows):,}")] if with_margin else []
        return [*length_facts([row.pair for row in rows]), *margins]


class HeldOutRewards:
    """The loss on held-out pairs while training, with the figures of pairs."""

    def __init__(
        self, model: nn.Module, objective: RewardObjective, rows: Sequence[RewardRow], pad: int
    ) -> None:
        self.model, self.objective, self.rows, self.pad = model, objective, rows, pad

    def __call__(self, stop: StopAsked) -> HeldOut | None:
        rewards = pair_rewards(
            self.model, self.objective, self.rows, self.pad, progress=lambda _done, _all: None, stop=stop
        )
        if rewards.isnan().any():
            return None
        losses = objective_losses(self.objective, self.rows, rewards)
        return HeldOut(float(losses.mean()), len(self.rows), len(self.rows), reward_metrics(rewards))


@torch.no_grad()
def pair_rewards(
    model: nn.Module,
    objective: RewardObjective,
    rows: Sequence[RewardRow],
    pad: int,
    *,
    progress: Progress,
    stop: StopFlag,
) -> Tensor:
    """Rewards of the answers under the model as it stands. Shape: [rows, 2], float64; NaN from where `stop`
    said so."""
    found = torch.full((len(rows), 2), torch.nan, dtype=torch.float64)
    done = 0
    with evaluation_mode(model):
        for places in longest_first([row.tokens for row in rows], tokens=TOKENS_PER_BATCH):
            if stop():
                break
            batch = to_device(_batch([rows[place] for place in places], pad), device_of(model))
            found[places] = objective.rewards(model, batch).view(-1, 2).double().cpu()
            done += len(places)
            progress(done, len(rows))
    return found


def objective_losses(objective: RewardObjective, rows: Sequence[RewardRow], rewards: Tensor) -> Tensor:
    """The loss of every pair, in float64. Shapes: rewards [rows, 2] -> [rows]."""
    margins = torch.tensor([row.margin for row in rows], dtype=torch.float64)
    return pair_losses(rewards, margins, objective.settings.center_rewards_coefficient)


def _batch(rows: Sequence[RewardRow], pad: int) -> RewardBatch:
    return reward_batch([row.pair for row in rows], [row.margin for row in rows], pad)
