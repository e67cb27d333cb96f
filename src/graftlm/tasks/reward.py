"""Reward model: an adapter and a head that tell the better answer, from pairs that people judged."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.notices import notice
from graftlm.data.branches import Branched
from graftlm.data.preference_check import length_facts, pair_findings
from graftlm.data.preference_encode import encode_preferences
from graftlm.data.preferences import Preference
from graftlm.data.records import Problem
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
from graftlm.tasks.base import Task, say_unpacked, spread
from graftlm.tasks.dataset import Dataset, RawDataset, held_out_records, kept, read_split
from graftlm.tasks.pair_measures import digest_of, during_training, ids_of, require_finite
from graftlm.tasks.preference import UNPACKED, to_pairs
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked
from graftlm.training.recipe import Recipe
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


class RewardTask(Task[RewardBatch]):
    """A number for each answer, higher for the chosen one of a pair."""

    name = "reward"
    keeps_known_text = False

    @property
    def settings(self) -> RewardSettings:
        """What the recipe says of the task."""
        settings = self.recipe.task.settings
        assert isinstance(settings, RewardSettings)
        return settings

    def read(self) -> None:
        self._raw = read_split(self.recipe.data, self.recipe.train.seed, to_pairs)
        for finding in pair_findings(self._raw.train):
            notice(str(finding))

    def read_held_out(self, limit: int | None = None) -> None:
        data = self.recipe.data
        pairs, found = held_out_records(data.path, data, to_pairs)
        self._raw = RawDataset[Preference](found, (), tuple(pairs[:limit]))

    def settled(self) -> Recipe:
        say_unpacked(self.recipe, UNPACKED)
        data = self.recipe.data.model_copy(update={"packing": False})
        return self.recipe.model_copy(update={"data": data})

    @property
    def ending(self) -> Ending:
        return Ending("rows", (REWARD,), "number", self.recipe.train.seed)

    def require_base(self, model: nn.Module) -> None:
        require_causal(model)

    def encode(self, tokenizer: Any) -> None:
        raw, data = self._raw, self.recipe.data
        self._pad = int(tokenizer.pad_token_id)
        train, held_out = (
            kept(*self._encoded(part, tokenizer), data, name) if part or name == "held-out" else ()
            for part, name in ((raw.train, "training"), (raw.held_out, "held-out"))
        )
        self.dataset: Dataset[RewardRow] = Dataset(data.path, raw.format, train, held_out, raw.repeats)

    def _encoded(
        self, pairs: Sequence[Preference], tokenizer: Any
    ) -> tuple[tuple[RewardRow, ...], tuple[Problem, ...]]:
        data = self.recipe.data
        margins = {pair.row: pair.margin or 0.0 for pair in pairs}
        found = encode_preferences(pairs, tokenizer, data.max_length, data.template)
        return tuple(RewardRow(row, margins[row.row]) for row in found.rows), found.problems

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
        for places in _by_length(rows):
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


def _by_length(rows: Sequence[RewardRow]) -> Iterator[list[int]]:
    """Places of rows, longest first."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: (-rows[place].tokens, place)):
        if batch and rows[batch[0]].tokens * (len(batch) + 1) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
