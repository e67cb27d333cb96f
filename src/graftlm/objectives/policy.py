"""Learning from rewards by groups of answers: GRPO with its variants, and RLOO.

The answers were written by the policy itself, and each has an advantage. The reference is the same weights
with the adapter off; its log-probabilities come with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graftlm.data.branches import BranchBatch, Branched, branch_batch
from graftlm.models.dropout import drop_nothing
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.log_probs import AnswerLogProbs, Answers
from graftlm.objectives.policy_settings import GrpoSettings, RlooSettings

FEW = 16
"""Different tokens in a probe; any vocabulary has as many."""


@dataclass(frozen=True)
class PolicyBatch(BranchBatch):
    """Prompts with the answers that the policy wrote, A answers of N tokens in all.

    advantages: [A]. old_log_probs: [N] of the policy that wrote them; None while that is still this one.
    reference_log_probs: [N] of the base; None where nothing asks for them. facts: figures of the whole step,
    such as its mean reward, for the log. All on the host.
    """

    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


def lengths_of(batch: BranchBatch) -> list[int]:
    """Tokens of each answer, in order."""
    return [length for line in batch.documents for length in line[1:]]


def probe_batch(length: int) -> BranchBatch:
    """A prompt with two answers, `length` tokens in all."""
    ids = tuple(number % FEW for number in range(length))
    first, second = length // 3, 2 * length // 3
    return branch_batch([Branched(ids[:first], (ids[first:second], ids[second:]), 1, False)], 0)


class GrpoObjective(Objective[PolicyBatch]):
    """The clipped policy gradient, token by token, with a KL term where `beta` is not 0."""

    def __init__(self, model: nn.Module, settings: GrpoSettings) -> None:
        drop_nothing(model)
        self._settings = settings
        self._log_probs = AnswerLogProbs(model)
        self.path, self.why = self._log_probs.path, self._log_probs.why

    def __call__(self, model: nn.Module, batch: PolicyBatch) -> LossParts:
        settings = self._settings
        found = self._log_probs(
            model, batch, temperature=settings.temperature, with_entropy=True, tokens=self.tokens
        )
        owner = owners(found)
        new, advantages = found.log_probs, batch.advantages.to(found.log_probs)[owner]
        log_ratio = new - _old(batch, new)
        if settings.importance_sampling_level == "sequence":
            log_ratio = _means(log_ratio, found.lengths, owner)[owner]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(*settings.bounds)
        bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        losses = -torch.min(bounded * advantages, clipped * advantages)
        shown = clip_shares(ratio, advantages, settings.bounds)
        if settings.beta and batch.reference_log_probs is not None:
            kl = kl_estimate(new, batch.reference_log_probs.to(new))
            shown["kl"] = kl.detach().mean()
            weighted = kl * ratio if settings.use_bias_correction_kl else kl
            losses = losses + settings.beta * weighted
        loss, targets = self._summed(losses, found.lengths, owner)
        return LossParts(loss, targets, {**batch.facts, **as_floats({**shown, **entropy_of(found)})})

    def probe(self, length: int) -> PolicyBatch:
        plain = probe_batch(length)
        reference = torch.zeros(plain.target_tokens) if self._settings.beta else None
        return PolicyBatch(**vars(plain), advantages=torch.ones(2), reference_log_probs=reference)

    def _summed(self, losses: Tensor, lengths: tuple[int, ...], owner: Tensor) -> tuple[Tensor, int]:
        """The sum of the losses of tokens, and by how much the training step has to divide it."""
        kind, targets = self._settings.loss_type, grpo_targets(self._settings, lengths)
        if kind == "dapo":
            return losses.sum(), targets
        if kind == "bnpo":
            return losses.mean(), targets
        if kind == "dr_grpo":
            return losses.sum() / self._settings.max_completion_length, targets
        return _means(losses, lengths, owner).sum(), targets


class RlooObjective(Objective[PolicyBatch]):
    """The clipped policy gradient of whole answers; the KL to the base is in their rewards."""

    def __init__(self, model: nn.Module, settings: RlooSettings) -> None:
        drop_nothing(model)
        self._settings = settings
        self._log_probs = AnswerLogProbs(model)
        self.path, self.why = self._log_probs.path, self._log_probs.why

    def __call__(self, model: nn.Module, batch: PolicyBatch) -> LossParts:
        settings = self._settings
        found = self._log_probs(
            model, batch, temperature=settings.temperature, with_entropy=True, tokens=self.tokens
        )
        owner = owners(found)
        advantages = batch.advantages.to(found.log_probs)
        log_ratio = found.log_probs - _old(batch, found.log_probs)
        ratio = log_ratio.new_zeros(len(found.lengths)).index_add(0, owner, log_ratio).exp()
        losses = -torch.min(ratio * advantages, ratio.clamp(*settings.bounds) * advantages)
        shown = clip_shares(ratio, advantages, settings.bounds) | entropy_of(found)
        if batch.reference_log_probs is not None:
            reference = batch.reference_log_probs.to(found.log_probs)
            shown["kl"] = kl_estimate(found.log_probs.detach(), reference).mean()
        return LossParts(losses.sum(), len(found.lengths), {**batch.facts, **as_floats(shown)})

    def probe(self, length: int) -> PolicyBatch:
        return PolicyBatch(**vars(probe_batch(length)), advantages=torch.ones(2))


def grpo_targets(settings: GrpoSettings, lengths: Sequence[int]) -> int:
    """What the loss of a batch is a mean over: tokens, answers, or the batch itself.

    >>> grpo_targets(GrpoSettings(), [3, 5]), grpo_targets(GrpoSettings(loss_type="grpo"), [3, 5])
    (8, 2)
    """
    return {"dapo": sum(lengths), "bnpo": 1}.get(settings.loss_type, len(lengths))


def owners(found: Answers) -> Tensor:
    """The answer of each token. Shape: [N]."""
    lengths = torch.tensor(found.lengths, dtype=torch.long)
    owner = torch.arange(len(found.lengths)).repeat_interleave(lengths)
    return owner.to(found.log_probs.device, non_blocking=True)


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An estimate, of low variance and never negative, of the KL from the reference, for each token drawn.

    It is `exp(r) - r - 1` for the log-ratio r of the reference (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = reference - log_probs
    return log_ratio.exp() - log_ratio - 1


def clip_shares(ratio: Tensor, advantages: Tensor, bounds: tuple[float, float]) -> dict[str, Tensor]:
    """Share of the ratios that are beyond the bound that their advantage draws them to."""
    low = (ratio < bounds[0]) & (advantages < 0)
    high = (ratio > bounds[1]) & (advantages > 0)
    return {
        "clip_ratio/low_mean": low.float().mean(),
        "clip_ratio/high_mean": high.float().mean(),
        "clip_ratio/region_mean": (low | high).float().mean(),
    }


def entropy_of(found: Answers) -> dict[str, Tensor]:
    """Mean entropy of the distributions that the tokens were drawn from, in nats."""
    return {} if found.entropy is None else {"entropy": found.entropy.mean()}


def as_floats(shown: Mapping[str, Tensor]) -> dict[str, float]:
    """All figures at once: the host waits once."""
    values = torch.stack([value.detach().double() for value in shown.values()]).tolist()
    return dict(zip(shown, values, strict=True))


def _old(batch: PolicyBatch, new: Tensor) -> Tensor:
    """Log-probabilities of the policy that wrote the answers; this one's own while it has not changed."""
    return new.detach() if batch.old_log_probs is None else batch.old_log_probs.to(new)


def _means(values: Tensor, lengths: tuple[int, ...], owner: Tensor) -> Tensor:
    """Of the tokens of each answer. Shape: [A]."""
    counts = torch.tensor(lengths, dtype=values.dtype).to(values.device, non_blocking=True)
    return values.new_zeros(len(lengths)).index_add(0, owner, values) / counts
