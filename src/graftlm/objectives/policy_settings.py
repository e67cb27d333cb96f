"""Settings of tuning by rewards, by the names that TRL gives them: GRPO and RLOO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from graftlm.core.config import Config


def _listed(value: Any) -> Any:
    """One name stands for a list of one."""
    return (value,) if isinstance(value, str) else value


class SamplingSettings(Config):
    """What every policy says of its rollouts: how they are written, and what rewards them."""

    aliases: ClassVar[Mapping[str, str]] = {
        "reward_funcs": "rewards",
        "reward_functions": "rewards",
        "max_new_tokens": "max_completion_length",
        "response_length": "max_completion_length",
    }

    rewards: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(("exact_match",), min_length=1)
    """What is added up: a built-in reward by its name, `FILE.py:FUNCTION`, or `adapter:FOLDER` of a reward
    model on the same base. A function gets prompts, completions and the data's columns as lists."""
    reward_weights: tuple[float, ...] | None = None
    """One for each reward; none: 1."""
    max_completion_length: int = Field(256, ge=1)
    """Longest answer in tokens. Unwritten: at most half of `data.max_length`."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling; log-probabilities are taken at it too."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this share together."""
    mask_truncated_completions: bool = False
    """Learn nothing from answers that were cut off at `max_completion_length`."""

    @model_validator(mode="after")
    def _a_weight_each(self) -> Self:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards"
            )
        return self


class GroupSettings(SamplingSettings):
    """What GRPO and RLOO have in common: several answers to a prompt, judged against each other."""

    num_generations: int = Field(8, ge=2)
    """Answers to each prompt. A row of a batch is a prompt with all its answers."""
    num_iterations: int = Field(1, ge=1)
    """Optimizer steps on the same answers."""
    epsilon: float = Field(0.2, gt=0)
    """How far the ratio of new to old probability may move before it stops paying."""
    epsilon_high: float | None = Field(None, gt=0)
    """The bound above, where it is another one (DAPO, arXiv 2503.14476: 0.28)."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The clipping interval of the ratio."""
        above = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + above


class GrpoSettings(GroupSettings):
    """Group relative policy optimisation (arXiv 2402.03300) and its variants."""

    beta: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the base, which is the same weights with the adapter off."""
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    """What a token's loss is divided by. `dapo`: the tokens of the step, `bnpo`: of the micro-batch, `grpo`:
    of its answer, `dr_grpo`: `max_completion_length`."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """The standard deviation that advantages are divided by: of the group, of the step, or none."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of single tokens, or their geometric mean over the answer (GSPO, arXiv 2507.18071)."""
    delta: float | None = Field(None, gt=1)
    """Bound of the ratio where the advantage is negative (two-sided clipping)."""
    use_bias_correction_kl: bool = True
    """Weigh the KL term by the ratio, which makes its gradient that of the true KL (arXiv 2512.02556)."""


class RlooSettings(GroupSettings):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): an answer is one action."""

    num_generations: int = Field(4, ge=2)
    """Answers to each prompt. A row of a batch is a prompt with all its answers."""
    beta: float = Field(0.05, ge=0)
    """Weight of the log-ratio to the base, which is taken off the reward of each answer."""
    normalize_advantages: bool = False
    """Shift and scale the advantages of a step to mean 0 and deviation 1."""
    reward_clip_range: tuple[float, float] | None = None
    """Lowest and highest reward that counts."""


class PpoSettings(SamplingSettings):
    """Proximal policy optimisation (arXiv 1707.06347) with a value for each token."""

    aliases: ClassVar[Mapping[str, str]] = {**SamplingSettings.aliases, "num_iterations": "num_ppo_epochs"}

    num_generations: int = Field(1, ge=1)
    """Answers to each prompt. A row of a batch is a prompt with all its answers."""
    num_ppo_epochs: int = Field(4, ge=1)
    """Optimizer steps on the same answers."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the log-ratio to the base, which is taken off the reward of each token."""
    cliprange: float = Field(0.2, gt=0)
    """How far the ratio of new to old probability may move before it stops paying."""
    vf_coef: float = Field(0.1, gt=0)
    """Weight of the value's loss."""
    cliprange_value: float = Field(0.2, gt=0)
    """How far a value may move from the old one before it stops paying."""
    gamma: float = Field(1.0, gt=0, le=1)
    """What a reward is worth a token earlier."""
    lam: float = Field(0.95, ge=0, le=1)
    """Of generalised advantage estimation: 0 trusts the value, 1 the rewards."""
    whiten_rewards: bool = False
    """Scale the rewards of the tokens of a step to deviation 1."""
    missing_eos_penalty: float | None = Field(None, gt=0)
    """Taken off the reward of an answer that does not end by itself."""

    @property
    def num_iterations(self) -> int:
        """Optimizer steps on the same answers."""
        return self.num_ppo_epochs
