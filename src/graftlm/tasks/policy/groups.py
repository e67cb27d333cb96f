"""GRPO and RLOO: several answers to each prompt, judged against each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.data.branches import BranchBatch
from graftlm.objectives.advantages import grpo_advantages, rloo_advantages
from graftlm.objectives.log_probs import AnswerLogProbs
from graftlm.objectives.policy import GrpoObjective, PolicyBatch, RlooObjective, grpo_targets, lengths_of
from graftlm.objectives.policy_settings import GroupSettings, GrpoSettings, RlooSettings
from graftlm.tasks.policy.rollouts import Rollouts
from graftlm.tasks.policy.task import PolicyTask
from graftlm.tasks.policy.writer import LogProbs, Passes

OLD, REFERENCE = "old_log_probs", "reference_log_probs"


class GroupTask(PolicyTask[PolicyBatch]):
    """What both have in common."""

    @property
    @abstractmethod
    def groups(self) -> GroupSettings:
        """The settings."""

    @abstractmethod
    def targets(self, lengths: Sequence[int]) -> int:
        """What the loss of a batch with answers of these lengths is a mean over."""

    @property
    def group(self) -> int:
        return self.groups.num_generations

    @property
    def iterations(self) -> int:
        return self.groups.num_iterations

    def form(self, plain: BranchBatch, tensors: Mapping[str, Any]) -> PolicyBatch:
        lengths = lengths_of(plain)
        found = {"advantages": torch.ones(len(lengths)), **tensors}
        return replace(PolicyBatch(**vars(plain), **found), target_tokens=self.targets(lengths))

    def passes_of(self, model: nn.Module, *, old: bool, reference: bool) -> Passes:
        """Log-probabilities of the policy and of the base, as far as they are wanted."""
        log_probs = AnswerLogProbs(model)

        def under(name: str) -> LogProbs:
            return lambda model, batch: {
                name: log_probs(model, batch, temperature=self.sampling.temperature).log_probs
            }

        return Passes(under(OLD) if old else None, under(REFERENCE) if reference else None)


class GrpoTask(GroupTask):
    """Group relative policy optimisation."""

    name = "grpo"

    @property
    def groups(self) -> GrpoSettings:
        settings = self.sampling
        assert isinstance(settings, GrpoSettings)
        return settings

    def targets(self, lengths: Sequence[int]) -> int:
        return grpo_targets(self.groups, lengths)

    def objective(self, model: nn.Module) -> GrpoObjective:
        return GrpoObjective(model, self.groups)

    def passes(self, model: nn.Module) -> Passes:
        return self.passes_of(model, old=self.iterations > 1, reference=self.groups.beta > 0)

    def judge(self, found: Rollouts) -> Rollouts:
        rewards = found.totals.view(len(found.rows), -1)
        return _judged(found, grpo_advantages(rewards, self.groups))


class RlooTask(GroupTask):
    """REINFORCE with a leave-one-out baseline."""

    name = "rloo"

    @property
    def groups(self) -> RlooSettings:
        settings = self.sampling
        assert isinstance(settings, RlooSettings)
        return settings

    def targets(self, lengths: Sequence[int]) -> int:
        return len(lengths)

    def objective(self, model: nn.Module) -> RlooObjective:
        return RlooObjective(model, self.groups)

    def passes(self, model: nn.Module) -> Passes:
        has_kl = self.groups.beta > 0
        return self.passes_of(model, old=has_kl or self.iterations > 1, reference=has_kl)

    def judge(self, found: Rollouts) -> Rollouts:
        rewards, kl = found.totals.view(len(found.rows), -1), None
        if REFERENCE in found.of_tokens:
            log_ratio = found.of_tokens[OLD] - found.of_tokens[REFERENCE]
            kl = torch.stack([part.sum() for part in log_ratio.split(found.lengths)]).view_as(rewards)
        return _judged(found, rloo_advantages(rewards, self.groups, kl))


def _judged(found: Rollouts, advantages: Tensor) -> Rollouts:
    """Answers that could not be judged are left out of batches; their advantage is 0."""
    return replace(found, of_answers={"advantages": advantages.flatten().nan_to_num(nan=0.0)})
