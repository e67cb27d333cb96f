"""Reward model: one number for each answer, higher for the one that people preferred.

The loss is that of Bradley and Terry (1952), as InstructGPT has it (arXiv 2203.02155): -log sigmoid(chosen -
rejected - margin), with the margins of Llama 2 (arXiv 2307.09288) and a term that keeps rewards around zero
(arXiv 2312.09244).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.config import Config
from graftlm.data.branches import BranchBatch, Branched, branch_batch
from graftlm.models.dropout import drop_nothing
from graftlm.objectives.answer_rewards import AnswerRewards
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.preference import right

FEW = 16
"""Different tokens in a probe; any vocabulary has as many."""


class RewardSettings(Config):
    """A reward model."""

    aliases: ClassVar[Mapping[str, str]] = {"center_coefficient": "center_rewards_coefficient"}

    center_rewards_coefficient: float = Field(0.0, ge=0.0)
    """Weight of (chosen + rejected) ^ 2, which keeps rewards around zero; 0.01 is usual for that."""


@dataclass(frozen=True)
class RewardBatch(BranchBatch):
    """Lines of [prompt | chosen | rejected], a line for each of P pairs; what counts are the pairs.

    margins: [P], float32, by how much the chosen answer has to be better.
    """

    margins: Tensor = field(default_factory=lambda: torch.zeros(0))


def reward_batch(rows: Sequence[Branched], margins: Sequence[float], pad: int) -> RewardBatch:
    """A batch of pairs, whose targets are the pairs."""
    plain = branch_batch(rows, pad)
    known = {each.name: getattr(plain, each.name) for each in fields(plain)} | {"target_tokens": len(rows)}
    return RewardBatch(**known, margins=torch.tensor(margins, dtype=torch.float32))


class RewardObjective(Objective[RewardBatch]):
    """Sum of the losses of the pairs in a batch, and their number."""

    def __init__(self, model: nn.Module, settings: RewardSettings) -> None:
        self.settings = settings
        self.rewards = AnswerRewards(model)
        self.path, self.why = self.rewards.path, self.rewards.why
        drop_nothing(model)

    def __call__(self, model: nn.Module, batch: RewardBatch) -> LossParts:
        rewards = self.rewards(model, batch, self.tokens).view(-1, 2)
        margins = batch.margins.to(rewards, non_blocking=True)
        losses = pair_losses(rewards, margins, self.settings.center_rewards_coefficient)
        return LossParts(losses.sum(), len(rewards), reward_metrics(rewards.detach()))

    def probe(self, length: int) -> RewardBatch:
        """One pair: half of the tokens are the prompt, a quarter each answer."""
        ids = tuple(number % FEW for number in range(max(length, 4)))
        answer = len(ids) // 4
        prompt = len(ids) - 2 * answer
        answers = ids[prompt : prompt + answer], ids[prompt + answer :]
        return reward_batch([Branched(ids[:prompt], answers, 1, truncated=False)], [0.0], pad=0)


def pair_losses(rewards: Tensor, margins: Tensor, center: float) -> Tensor:
    """Losses [P] of rewards [P, 2], chosen before rejected, and margins [P].

    >>> pair_losses(torch.tensor([[1.0, 1.0]]), torch.zeros(1), center=0.0)
    tensor([0.6931])
    """
    chosen, rejected = rewards.unbind(1)
    losses = -F.logsigmoid(chosen - rejected - margins)
    return losses + center * (chosen + rejected).square() if center else losses


def reward_metrics(rewards: Tensor) -> dict[str, float]:
    """Means over pairs; of equal rewards one half is right. Shape: rewards [P, 2], chosen before rejected."""
    chosen, rejected = rewards.unbind(1)
    values = torch.stack(
        [right(chosen, rejected).mean(), (chosen - rejected).mean(), chosen.mean(), rejected.mean()]
    )
    names = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    return dict(zip(names, values.tolist(), strict=True))
