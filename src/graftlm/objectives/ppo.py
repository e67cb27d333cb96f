"""Proximal policy optimisation: a policy with a value head that says what reward is still to come.

The value reads the policy's own last hidden states, so policy and value learn by one adapter; its head serves
the run alone and is not part of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.data.branches import BranchBatch
from graftlm.models.dropout import drop_nothing
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.log_probs import AnswerLogProbs, Answers
from graftlm.objectives.policy import as_floats, clip_shares, entropy_of, kl_estimate, probe_batch
from graftlm.objectives.policy_settings import PpoSettings

VALUE_HEAD = "graft_value_head"
"""The name under which a model carries the head while it is trained."""


class ValueHead(nn.Module):
    """A number for each hidden state; 0 at the start."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=device, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros((), device=device, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Shapes: [N, H] to [N], in float32 or better."""
        precise = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return precise @ self.weight.to(precise) + self.bias.to(precise)


@dataclass(frozen=True)
class PpoBatch(BranchBatch):
    """Prompts with the answers that the policy wrote, N tokens in all.

    old_log_probs, old_values, advantages and returns (what the values should have been): [N], on the host.
    reference_log_probs: [N] of the base. facts: figures of the whole step, for the log.
    """

    old_log_probs: Tensor = field(default_factory=lambda: torch.zeros(0))
    old_values: Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: Tensor = field(default_factory=lambda: torch.zeros(0))
    reference_log_probs: Tensor | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


class PpoObjective(Objective[PpoBatch]):
    """The clipped policy gradient and the clipped squared error of the values, token by token."""

    def __init__(self, model: nn.Module, settings: PpoSettings) -> None:
        drop_nothing(model)
        self._settings = settings
        self._log_probs = AnswerLogProbs(model)
        self.path, self.why = self._log_probs.path, self._log_probs.why

    def __call__(self, model: nn.Module, batch: PpoBatch) -> LossParts:
        settings = self._settings
        found, values = self.values(model, batch)
        new = found.log_probs
        old, old_values = batch.old_log_probs.to(new), batch.old_values.to(new)
        advantages, returns = batch.advantages.to(new), batch.returns.to(new)
        bounds = 1 - settings.cliprange, 1 + settings.cliprange
        ratio = (new - old).exp()
        policy = -torch.min(ratio * advantages, ratio.clamp(*bounds) * advantages)
        near = old_values + (values - old_values).clamp(-settings.cliprange_value, settings.cliprange_value)
        errors = 0.5 * torch.max((values - returns).square(), (near - returns).square())
        loss = (policy + settings.vf_coef * errors).sum()
        shown = clip_shares(ratio, advantages, bounds) | entropy_of(found)
        shown |= {"loss/policy": policy.mean(), "loss/value": errors.mean(), "value": values.mean()}
        if batch.reference_log_probs is not None:
            shown["kl"] = kl_estimate(new.detach(), batch.reference_log_probs.to(new)).mean()
        return LossParts(loss, len(new), {**batch.facts, **as_floats(shown)})

    def values(self, model: Any, batch: BranchBatch) -> tuple[Answers, Tensor]:
        """Log-probabilities of the answers, and the value before each of their tokens: [N]."""
        found = self._log_probs(
            model, batch, temperature=self._settings.temperature, with_entropy=True, with_hidden=True,
            tokens=self.tokens,
        )  # fmt: skip
        assert found.hidden is not None  # asked for
        values: Tensor = getattr(model, VALUE_HEAD)(found.hidden)
        return found, values

    def probe(self, length: int) -> PpoBatch:
        plain = probe_batch(length)
        return PpoBatch(**vars(plain), **nothing_known(plain.target_tokens))


def nothing_known(tokens: int) -> dict[str, Any]:
    """The tensors of a batch, of so many tokens, that nobody has written: zeros, by name."""
    names = ("old_log_probs", "old_values", "advantages", "returns", "reference_log_probs")
    return dict.fromkeys(names, torch.zeros(tokens))
