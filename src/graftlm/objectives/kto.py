"""KTO (arXiv 2402.01306): answers marked good or bad, without pairs.

A good answer shall be likelier than under the reference by more than the policy has moved in general, a bad
one less likely. How far it has moved, z, is estimated on prompts with answers of other rows. Here each row
has another row's answer beside its own, the same one in every epoch: it sees the same prompt, which is
computed once, and its log-probability under the reference is known before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graftlm.core.config import Config
from graftlm.data.branches import BranchBatch, Branched, branch_batch
from graftlm.data.preferences.encode import MarkedRow
from graftlm.models.dropout import drop_nothing
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.log_probs import AnswerLogProbs
from graftlm.objectives.preference import FEW


class KtoSettings(Config):
    """Kahneman-Tversky optimisation."""

    aliases: ClassVar[Mapping[str, str]] = {
        "pref_beta": "beta",
        "kto_beta": "beta",
        "kto_chosen_weight": "desirable_weight",
        "kto_rejected_weight": "undesirable_weight",
    }

    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the base. Lower: further from the base."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`apo_zero_unpaired` (arXiv 2408.06266) leaves z out."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of good answers. The paper wants (weight x number) of good over bad ones at 1 to 4/3."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of bad answers."""


@dataclass(frozen=True)
class MarkedBatch(BranchBatch):
    """Lines of [prompt | answer] or [prompt | answer | another row's answer]; what counts are the lines.

    marks: [R], 1 for a good answer, 0 for a bad one. reference: [R, 1 or 2], log-probabilities under the
    reference; None: the policy is its own reference.
    """

    marks: Tensor | None = None
    reference: Tensor | None = None


def marked_batch(rows: Sequence[MarkedRow], pad: int, reference: Tensor | None = None) -> MarkedBatch:
    """A batch of marked answers, whose targets are the rows."""
    plain = branch_batch([row.branched for row in rows], pad)
    known = {field.name: getattr(plain, field.name) for field in fields(plain)} | {"target_tokens": len(rows)}
    marks = torch.tensor([float(row.is_good) for row in rows])
    return MarkedBatch(**known, marks=marks, reference=reference)


@dataclass(frozen=True)
class MarkedJudged:
    """What the loss says of R rows. losses: [R], with gradient. rewards: [R]. divergence: z, at least 0."""

    losses: Tensor
    rewards: Tensor
    divergence: Tensor


class KtoObjective(Objective[MarkedBatch]):
    """Sum of the losses of the rows in a batch, and their number."""

    def __init__(self, model: nn.Module, settings: KtoSettings) -> None:
        drop_nothing(model)
        self.settings = settings
        self.log_probs = AnswerLogProbs(model)
        self.path, self.why = self.log_probs.path, self.log_probs.why

    def judge(self, sums: Tensor, marks: Tensor, reference: Tensor) -> MarkedJudged:
        """Losses and rewards of R rows.

        Shapes: sums and reference [R, 1 or 2]: log-probabilities of the row's own answer, and of the other
        row's. marks [R].
        """
        settings = self.settings
        ratios = sums - reference
        divergence = sums.new_zeros(())
        if settings.loss_type == "kto" and ratios.shape[1] > 1:
            divergence = ratios[:, 1].detach().mean().clamp(min=0)
        signs, own = 2 * marks - 1, ratios[:, 0]
        weights = torch.where(marks > 0, settings.desirable_weight, settings.undesirable_weight)
        losses = weights * torch.sigmoid(-settings.beta * signs * (own - divergence))
        return MarkedJudged(losses, settings.beta * own.detach(), divergence)

    def __call__(self, model: nn.Module, batch: MarkedBatch) -> LossParts:
        answers = self.log_probs(model, batch, tokens=self.tokens)
        sums = answers.sums().view(len(batch.rows), -1)
        marks = torch.ones(len(sums)) if batch.marks is None else batch.marks
        known = batch.reference
        reference = sums.detach() if known is None else known.to(sums, non_blocking=True)
        judged = self.judge(sums, marks.to(sums, non_blocking=True), reference)
        return LossParts(judged.losses.sum(), len(sums), marked_metrics(judged, marks))

    def probe(self, length: int) -> MarkedBatch:
        """One row: half of the tokens are the prompt, a quarter each answer."""
        ids = tuple(number % FEW for number in range(max(length, 4)))
        answer = len(ids) // 4
        prompt = len(ids) - 2 * answer
        answers = ids[prompt : prompt + answer], ids[prompt + answer :]
        row = Branched(ids[:prompt], answers, 1, truncated=False)
        return marked_batch([MarkedRow(row, is_good=True)], pad=0)


def marked_metrics(judged: MarkedJudged, marks: Tensor) -> dict[str, float]:
    """Means over good and over bad answers, as far as the batch has them, and z."""
    *rewards, divergence = torch.cat([judged.rewards, judged.divergence.view(1)]).tolist()
    found = {"kl": float(divergence)}
    for name, mark in (("chosen", 1.0), ("rejected", 0.0)):
        some = [reward for reward, given in zip(rewards, marks.tolist(), strict=True) if given == mark]
        if some:
            found[f"rewards/{name}"] = sum(some) / len(some)
    if len(found) > 2:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
