"""Losses over preference pairs, by the names they have in the field. Each is one number per pair.

`chosen` and `rejected` are scores [P]: log-probability under the policy minus under the reference, summed
over the answer (for another f-divergence than reverse KL: f' of that ratio). Lengths count answer tokens.

| name | paper |
|---|---|
| `sigmoid` | DPO, arXiv 2305.18290; with `label_smoothing` the conservative one (Mitchell 2023) |
| `sigmoid_norm` | DPO on scores per token |
| `hinge` | SLiC, arXiv 2305.10425 |
| `ipo` | IPO, arXiv 2310.12036, on scores per token; beta is its tau |
| `robust` | Robust DPO, arXiv 2403.00409 |
| `exo_pair` | EXO, arXiv 2402.00856 |
| `nca_pair` | NCA, arXiv 2402.05369 |
| `bco_pair` | BCO, arXiv 2404.04656, without its running mean |
| `sppo_hard` | SPPO, arXiv 2405.00675, with hard labels |
| `apo_zero`, `apo_down` | APO, arXiv 2408.06266 |
| `discopop` | DiscoPOP, arXiv 2406.08414 |
| `sft` | minus the log-probability per token of the chosen answer: RPO's further term, arXiv 2404.19733 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence"]

BY_DIFFERENCE: frozenset[LossType] = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "sft"}
)
"""Losses of the difference of two scores: those that another f-divergence makes sense for."""
SMOOTHED: frozenset[LossType] = frozenset({"sigmoid", "robust", "exo_pair"})
"""Losses that read `label_smoothing`."""


class Settings(Protocol):
    """What the losses read."""

    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def discopop_tau(self) -> float: ...


@dataclass(frozen=True)
class Scores:
    """Of P pairs. chosen, rejected: [P]. log_probs: [P] of the chosen answer under the policy, summed.
    chosen_tokens, rejected_tokens: [P]."""

    chosen: Tensor
    rejected: Tensor
    log_probs: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def difference(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def difference_per_token(self) -> Tensor:
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def diverged(log_ratios: Tensor, divergence: Divergence) -> Tensor:
    """f'(policy / reference) of log-ratios, up to a constant: f-DPO, arXiv 2309.16240."""
    if divergence == "forward_kl":
        return 1 - torch.exp(-log_ratios)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    return log_ratios


def _sigmoid(scores: Scores, settings: Settings) -> Tensor:
    return smoothed(settings.beta * scores.difference, settings.label_smoothing)


def _sigmoid_norm(scores: Scores, settings: Settings) -> Tensor:
    return -F.logsigmoid(settings.beta * scores.difference_per_token)


def _hinge(scores: Scores, settings: Settings) -> Tensor:
    return torch.relu(1 - settings.beta * scores.difference)


def _ipo(scores: Scores, settings: Settings) -> Tensor:
    return (scores.difference_per_token - 1 / (2 * settings.beta)) ** 2


def _robust(scores: Scores, settings: Settings) -> Tensor:
    logits, flipped = settings.beta * scores.difference, settings.label_smoothing
    clean = -(1 - flipped) * F.logsigmoid(logits) + flipped * F.logsigmoid(-logits)
    return clean / (1 - 2 * flipped)


def _exo_pair(scores: Scores, settings: Settings) -> Tensor:
    logits, flipped = settings.beta * scores.difference, settings.label_smoothing
    better, worse = F.logsigmoid(logits), F.logsigmoid(-logits)
    return better.exp() * (better - math.log1p(-flipped)) + worse.exp() * (worse - math.log(flipped))


def _nca_pair(scores: Scores, settings: Settings) -> Tensor:
    chosen, rejected = settings.beta * scores.chosen, settings.beta * scores.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(scores: Scores, settings: Settings) -> Tensor:
    return -F.logsigmoid(settings.beta * scores.chosen) - F.logsigmoid(-settings.beta * scores.rejected)


def _sppo_hard(scores: Scores, settings: Settings) -> Tensor:
    half = 0.5 / settings.beta
    return (scores.chosen - half) ** 2 + (scores.rejected + half) ** 2


def _apo_zero(scores: Scores, settings: Settings) -> Tensor:
    return torch.sigmoid(-settings.beta * scores.chosen) + torch.sigmoid(settings.beta * scores.rejected)


def _apo_down(scores: Scores, settings: Settings) -> Tensor:
    return torch.sigmoid(settings.beta * scores.chosen) + torch.sigmoid(-settings.beta * scores.difference)


def _discopop(scores: Scores, settings: Settings) -> Tensor:
    logits = settings.beta * scores.difference
    share = torch.sigmoid(logits / settings.discopop_tau)
    return -F.logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


def _sft(scores: Scores, settings: Settings) -> Tensor:
    return -scores.log_probs / scores.chosen_tokens


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Minus the log-likelihood of the label, which is wrong with that probability. Shape: as `logits`."""
    if not label_smoothing:
        return -F.logsigmoid(logits)
    return -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing


LOSSES: Mapping[LossType, Callable[[Scores, Settings], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
}
"""Name -> losses [P] of P pairs."""
