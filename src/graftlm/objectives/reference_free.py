"""Preference pairs without a reference: SimPO and ORPO compare log-probabilities per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.config import Config
from graftlm.objectives.preference import Judged, PairObjective
from graftlm.objectives.preference_losses import smoothed

NEVER_CERTAIN = -1e-6
"""The largest mean log-probability whose odds are finite and have a gradient in float32."""


class SimpoSettings(Config):
    """SimPO (arXiv 2405.14734)."""

    aliases: ClassVar[Mapping[str, str]] = {"gamma": "simpo_gamma", "pref_beta": "beta"}

    beta: float = Field(2.0, gt=0)
    """Scale of the rewards."""
    simpo_gamma: float = Field(1.0, ge=0)
    """By how much the chosen reward shall exceed the other; usually a quarter to all of `beta`."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Probability that a label is wrong."""
    cpo_alpha: float = Field(0.0, ge=0)
    """Weight of the negative log-likelihood per token of the chosen answer (CPO-SimPO)."""


class OrpoSettings(Config):
    """ORPO (arXiv 2403.07691)."""

    aliases: ClassVar[Mapping[str, str]] = {"lambda": "beta", "orpo_alpha": "beta", "pref_beta": "beta"}

    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio beside the likelihood of the chosen answer; the paper's lambda."""


class SimpoObjective(PairObjective):
    """-log sigmoid(beta (mean log-probability of chosen - of rejected) - gamma)."""

    needs_reference = False

    def __init__(self, model: nn.Module, settings: SimpoSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def judge(self, sums: Tensor, lengths: Tensor, reference: Tensor) -> Judged:
        settings, means = self.settings, sums / lengths
        rewards = settings.beta * means
        losses = smoothed(rewards[:, 0] - rewards[:, 1] - settings.simpo_gamma, settings.label_smoothing)
        return Judged(losses - settings.cpo_alpha * means[:, 0], rewards.detach())


class OrpoObjective(PairObjective):
    """-mean log-probability of chosen - beta log sigmoid(log odds of chosen - log odds of rejected).

    Odds are of the mean probability per token. As in the paper the first term is over the answer; TRL takes
    it over the prompt too.
    """

    needs_reference = False

    def __init__(self, model: nn.Module, settings: OrpoSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def judge(self, sums: Tensor, lengths: Tensor, reference: Tensor) -> Judged:
        beta, means = self.settings.beta, sums / lengths
        odds = log_odds(means)
        losses = -means[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
        return Judged(losses, beta * means.detach())


def log_odds(log_probs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, without a difference of nearly equal numbers. Shape: as given.

    >>> log_odds(torch.tensor([0.5, 0.75]).log()).exp().tolist()
    [1.0, 3.0]
    """
    at = log_probs.clamp(max=NEVER_CERTAIN)
    return at - torch.log(-torch.expm1(at))
