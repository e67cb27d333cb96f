"""From rewards to advantages: how much better an answer was than could be expected. NaN: not judged."""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.objectives.policy_settings import GrpoSettings, RlooSettings

TINY = 1e-4
"""Added to a deviation that is divided by, as in TRL."""
EVEN = 1e-8
"""Rewards of a group that deviate no more than this teach nothing."""


def grpo_advantages(rewards: Tensor, settings: GrpoSettings) -> Tensor:
    """Rewards against the mean of their group. Shapes: [groups, answers] both. NaN stays where it was.

    >>> rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> grpo_advantages(rewards, GrpoSettings(scale_rewards="none")).tolist()
    [[0.5, -0.5], [0.0, 0.0]]
    """
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    if settings.scale_rewards == "none":
        return centred
    deviation = deviations(rewards) if settings.scale_rewards == "group" else deviations(rewards.view(1, -1))
    return centred / (deviation.unsqueeze(1) + TINY)


def rloo_advantages(rewards: Tensor, settings: RlooSettings, kl: Tensor | None = None) -> Tensor:
    """Rewards against the mean of the other answers to the same prompt. Shapes: [groups, answers] all.

    kl: log-ratio of each answer to the base, which `beta` of the settings takes off its reward.

    >>> rloo_advantages(torch.tensor([[1.0, 0.0, 0.5]]), RlooSettings()).tolist()
    [[0.75, -0.75, 0.0]]
    """
    if settings.reward_clip_range is not None:
        rewards = rewards.clamp(*settings.reward_clip_range)
    if kl is not None:
        rewards = rewards - settings.beta * kl
    judged = (~rewards.isnan()).sum(dim=1, keepdim=True)
    others = (rewards.nansum(dim=1, keepdim=True) - rewards) / (judged - 1).clamp(min=1)
    # An answer without another one beside it has nothing to be compared with.
    advantages = torch.where(rewards.isnan() | (judged > 1), rewards - others, torch.zeros_like(rewards))
    if not settings.normalize_advantages:
        return advantages
    return (advantages - advantages.nanmean()) / (deviations(advantages.view(1, -1)) + TINY)


def deviations(rewards: Tensor) -> Tensor:
    """Standard deviation (by n - 1) of each row, without its NaN; 0 where fewer than two are left.

    >>> deviations(torch.tensor([[1.0, 3.0, float("nan")], [2.0, float("nan"), float("nan")]])).tolist()
    [1.4142135381698608, 0.0]
    """
    counts = (~rewards.isnan()).sum(dim=1)
    squares = (rewards - rewards.nanmean(dim=1, keepdim=True)).square().nansum(dim=1)
    return (squares / (counts - 1).clamp(min=1)).sqrt()


def generalised_advantages(
    rewards: Tensor, values: Tensor, lengths: list[int], *, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438) along each answer; 0 lies behind its end.

    Shapes: rewards and values [N], of the tokens of all answers in order; lengths: of each answer.

    >>> one = torch.ones(2)
    >>> generalised_advantages(one, one, [2], gamma=1.0, lam=1.0).tolist()
    [1.0, 0.0]
    """
    found = torch.zeros_like(rewards)
    stop = 0
    for length in lengths:
        start, stop = stop, stop + length
        ahead, advantage = 0.0, torch.zeros((), dtype=rewards.dtype)
        for place in reversed(range(start, stop)):
            surprise = rewards[place] + gamma * ahead - values[place]
            advantage = surprise + gamma * lam * advantage
            found[place] = advantage
            ahead = float(values[place])
    return found
