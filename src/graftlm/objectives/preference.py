"""Preference pairs: a policy that makes the chosen answer likelier than the rejected one.

The reference is the same model with its adapters off. Its log-probabilities do not change in training, so
they are computed once, before the first step, and come with the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from graftlm.core.config import Config
from graftlm.data.branches import BranchBatch, Branched, branch_batch
from graftlm.models.dropout import drop_nothing
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.log_probs import AnswerLogProbs
from graftlm.objectives.preference_losses import (
    BY_DIFFERENCE,
    LOSSES,
    SMOOTHED,
    Divergence,
    LossType,
    Scores,
    diverged,
)

FEW = 16
"""Different tokens in a probe; any vocabulary has as many."""


class DpoSettings(Config):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives."""

    aliases: ClassVar[Mapping[str, str]] = {
        "pref_beta": "beta",
        "dpo_beta": "beta",
        "pref_loss": "loss_type",
        "rpo_alpha": "loss_weights",
        "pref_ftx": "loss_weights",
    }

    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the base; of `ipo` its tau. Lower: further from the base."""
    loss_type: tuple[LossType, ...] = ("sigmoid",)
    """One loss, or several that are added up: `[sigmoid, sft]` is DPO with RPO's further term."""
    loss_weights: tuple[float, ...] | None = None
    """A weight for each loss type; none: 1 each."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Probability that a label is wrong; read by `sigmoid`, `robust` and `exo_pair`."""
    f_divergence_type: Divergence = "reverse_kl"
    """What holds the policy to the base (f-DPO, arXiv 2309.16240)."""
    discopop_tau: float = Field(0.05, gt=0)
    """Temperature of `discopop`."""

    @field_validator("loss_type", "loss_weights", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | float | int) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        types, weights = self.loss_type, self.loss_weights
        if not types:
            raise ValueError(f"loss_type is empty; choose from {', '.join(LOSSES)}")
        if weights is not None and len(weights) != len(types):
            raise ValueError(f"loss_weights has {len(weights)} numbers for {len(types)} loss types")
        if self.label_smoothing and not SMOOTHED & set(types):
            raise ValueError(
                f"label_smoothing has no effect with loss_type: {', '.join(types)}; "
                f"{', '.join(sorted(SMOOTHED))} read it"
            )
        if "exo_pair" in types and not self.label_smoothing:
            raise ValueError("loss_type: exo_pair needs label_smoothing above 0, such as 0.001")
        if self.f_divergence_type != "reverse_kl" and not set(types) <= BY_DIFFERENCE:
            unfit = ", ".join(sorted(set(types) - BY_DIFFERENCE))
            raise ValueError(f"f_divergence_type: {self.f_divergence_type} is not defined for {unfit}")
        return self


class IpoSettings(DpoSettings):
    """Identity preference optimisation (arXiv 2310.12036): DPO with `loss_type: ipo`."""

    loss_type: tuple[LossType, ...] = ("ipo",)


@dataclass(frozen=True)
class PairBatch(BranchBatch):
    """Lines of [prompt | chosen | rejected], a line for each pair; what counts are the pairs.

    reference: [P, 2], log-probabilities of both answers under the reference; None: the policy is its own
    reference, as it is before the first step.
    """

    reference: Tensor | None = None


def pair_batch(rows: Sequence[Branched], pad: int, reference: Tensor | None = None) -> PairBatch:
    """A batch of pairs, whose targets are the pairs."""
    plain = branch_batch(rows, pad)
    known = {field.name: getattr(plain, field.name) for field in fields(plain)} | {"target_tokens": len(rows)}
    return PairBatch(**known, reference=reference)


@dataclass(frozen=True)
class Judged:
    """Of P pairs. losses: [P], with gradient. rewards: [P, 2], of chosen and rejected, without."""

    losses: Tensor
    rewards: Tensor


class PairObjective(Objective[PairBatch]):
    """Sum of the losses of the pairs in a batch, and their number."""

    needs_reference: ClassVar[bool] = True
    """Whether the loss compares the policy with a reference."""

    def __init__(self, model: nn.Module) -> None:
        drop_nothing(model)
        self.log_probs = AnswerLogProbs(model)
        self.path, self.why = self.log_probs.path, self.log_probs.why

    @abstractmethod
    def judge(self, sums: Tensor, lengths: Tensor, reference: Tensor) -> Judged:
        """Losses and rewards of pairs.

        Shapes: [P, 2] each, chosen before rejected. sums: log-probabilities of the answers under the policy.
        lengths: tokens of the answers. reference: as `sums`, under the reference.
        """

    def __call__(self, model: nn.Module, batch: PairBatch) -> LossParts:
        answers = self.log_probs(model, batch, tokens=self.tokens)
        sums = answers.sums().view(-1, 2)
        lengths = torch.tensor(answers.lengths).view(-1, 2).to(sums, non_blocking=True)
        known = batch.reference
        reference = sums.detach() if known is None else known.to(sums, non_blocking=True)
        judged = self.judge(sums, lengths, reference)
        return LossParts(judged.losses.sum(), len(sums), pair_metrics(judged.rewards, sums.detach()))

    def probe(self, length: int) -> PairBatch:
        """One pair: half of the tokens are the prompt, a quarter each answer."""
        ids = tuple(number % FEW for number in range(max(length, 4)))
        answer = len(ids) // 4
        prompt = len(ids) - 2 * answer
        answers = ids[prompt : prompt + answer], ids[prompt + answer :]
        return pair_batch([Branched(ids[:prompt], answers, 1, truncated=False)], pad=0)


class DpoObjective(PairObjective):
    """The losses of `DpoSettings`."""

    def __init__(self, model: nn.Module, settings: DpoSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def judge(self, sums: Tensor, lengths: Tensor, reference: Tensor) -> Judged:
        settings = self.settings
        ratios = sums - reference
        chosen, rejected = diverged(ratios, settings.f_divergence_type).unbind(1)
        scores = Scores(chosen, rejected, sums[:, 0], *lengths.unbind(1))
        weights = settings.loss_weights or (1.0,) * len(settings.loss_type)
        parts = [
            weight * LOSSES[name](scores, settings)
            for name, weight in zip(settings.loss_type, weights, strict=True)
        ]
        return Judged(torch.stack(parts).sum(0), settings.beta * ratios.detach())


def pair_metrics(rewards: Tensor, sums: Tensor) -> dict[str, float]:
    """Means over pairs, under the names that TRL logs; of equal rewards one half is right.

    Shapes: rewards and sums (log-probabilities) [P, 2].
    """
    chosen, rejected = rewards.unbind(1)
    values = torch.stack(
        [
            right(chosen, rejected).mean(),
            (chosen - rejected).mean(),
            chosen.mean(),
            rejected.mean(),
            *sums.mean(0),
        ]
    )
    names = ("accuracies", "margins", "chosen", "rejected")
    keys = (*(f"rewards/{name}" for name in names), "logps/chosen", "logps/rejected")
    return dict(zip(keys, values.tolist(), strict=True))


def right(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen answer has the higher reward, 0 where the rejected one, 0.5 where both are equal.

    >>> right(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 3.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (torch.sign(chosen - rejected) + 1) / 2
