"""PPO: a policy with a critic, which says at each token what reward is still to come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.data.branches import BranchBatch
from graftlm.objectives.advantages import TINY, generalised_advantages
from graftlm.objectives.policy_settings import PpoSettings
from graftlm.objectives.ppo import VALUE_HEAD, PpoBatch, PpoObjective, ValueHead, nothing_known
from graftlm.quant.facts import device_of
from graftlm.tasks.policy.rollouts import Rollouts
from graftlm.tasks.policy.task import PolicyTask
from graftlm.tasks.policy.writer import Passes


class PpoTask(PolicyTask[PpoBatch]):
    """Proximal policy optimisation. The critic's head is trained with the adapter and not kept with it."""

    name = "ppo"

    @property
    def settings(self) -> PpoSettings:
        """The settings."""
        settings = self.sampling
        assert isinstance(settings, PpoSettings)
        return settings

    @property
    def group(self) -> int:
        return self.settings.num_generations

    @property
    def iterations(self) -> int:
        return self.settings.num_ppo_epochs

    def objective(self, model: nn.Module) -> PpoObjective:
        if not hasattr(model, VALUE_HEAD):
            config: Any = model.config
            width = int(config.get_text_config().hidden_size)
            model.add_module(VALUE_HEAD, ValueHead(width, device_of(model)))
        return PpoObjective(model, self.settings)

    def own_parameters(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        head = model.get_submodule(VALUE_HEAD)
        return {f"{VALUE_HEAD}.{name}": parameter for name, parameter in head.named_parameters()}

    def form(self, plain: BranchBatch, tensors: Mapping[str, Any]) -> PpoBatch:
        return PpoBatch(**vars(plain), **{**nothing_known(plain.target_tokens), **tensors})

    def passes(self, model: nn.Module) -> Passes:
        objective = self.objective(model)

        def policy(model: nn.Module, batch: BranchBatch) -> dict[str, Tensor]:
            found, values = objective.values(model, batch)
            return {"old_log_probs": found.log_probs, "old_values": values}

        def base(model: nn.Module, batch: BranchBatch) -> dict[str, Tensor]:
            return {"reference_log_probs": objective.values(model, batch)[0].log_probs}

        return Passes(policy, base)

    def judge(self, found: Rollouts) -> Rollouts:
        """The reward stands at the last token; the log-ratio to the base is taken off at each."""
        settings, tokens = self.settings, found.of_tokens
        rewards = -settings.kl_coef * (tokens["old_log_probs"] - tokens["reference_log_probs"])
        totals = found.totals.nan_to_num(nan=0.0)
        if settings.missing_eos_penalty is not None:
            totals = totals - settings.missing_eos_penalty * (~found.ended).to(totals)
        last = torch.tensor(found.lengths).cumsum(0) - 1
        rewards = rewards.index_add(0, last, totals.to(rewards))
        if settings.whiten_rewards:
            rewards = rewards / (rewards.std() + TINY)
        values = tokens["old_values"]
        advantages = generalised_advantages(
            rewards, values, found.lengths, gamma=settings.gamma, lam=settings.lam
        )
        learnt = self._learnt(found)
        spread = advantages[learnt]
        whitened = (advantages - spread.mean()) / (spread.std() + TINY) if len(spread) > 1 else advantages
        return replace(found, of_tokens={**tokens, "advantages": whitened, "returns": advantages + values})

    def _learnt(self, found: Rollouts) -> Tensor:
        """Tokens of answers that something is learnt from: the others must not move the mean."""
        taught = found.taught(not self.settings.mask_truncated_completions)
        return taught.repeat_interleave(torch.tensor(found.lengths))
