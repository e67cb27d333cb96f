"""Do two states of a model say the same? Figures that prove (or refute) a merge, a save or a reload."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.models.encoder_decoder import is_encoder_decoder
from graftlm.quant.facts import device_of

MAX_MEAN_KL = 1e-3
"""Nats per token between a merged model and its adapter; rounding to 16 bits stays well below."""
MIN_TOP1 = 0.99
"""Share of decided positions with the same most likely token."""
DECIDED = 0.1
"""Nats by which the best token leads the second where a position counts as decided; below that, 16-bit
rounding alone may swap them."""


@dataclass(frozen=True)
class Agreement:
    """Next-token distributions of two models on the same probes. KL in nats per token."""

    probes: int
    tokens: int
    mean_kl: float
    top1: float
    """Share of decided positions with the same most likely token."""
    largest_logit_difference: float

    @property
    def is_same_model(self) -> bool:
        """Within what rounding in 16 bits explains."""
        return self.mean_kl <= MAX_MEAN_KL and self.top1 >= MIN_TOP1

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {**asdict(self), "is_same_model": self.is_same_model}

    def __str__(self) -> str:
        is_per_row = self.tokens == self.probes  # a head that labels rows says one thing of each
        each, on = ("row", "") if is_per_row else ("token", f"{self.tokens} tokens of ")
        return (
            f"KL {self.mean_kl:.1e} nats per {each}, top-1 agreement {100 * self.top1:.1f} % on "
            f"{on}{self.probes} probes"
        )


@torch.no_grad()
def logits_on(model: nn.Module, probes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each probe, one at a time, in eval mode. Shapes: [tokens, vocabulary], float32, CPU.

    An encoder-decoder reads the probe in both halves. A head that labels rows gives [1, labels]; where each
    of its labels holds or not, [labels, 2]; where it tells a number, [1, 1].
    """
    device = device_of(model)
    was_training = model.training
    model.eval()
    try:
        return [_one(model, torch.tensor([list(probe)], device=device)).float().cpu() for probe in probes]
    finally:
        model.train(was_training)


def _one(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(**_inputs(model, ids), use_cache=False).logits
    if logits.dim() == 3:
        return logits[0]
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        return torch.stack((torch.zeros_like(logits[0]), logits[0]), dim=1)
    return logits


def _inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    both = {"input_ids": ids, "decoder_input_ids": ids}
    return both if is_encoder_decoder(model) else {"input_ids": ids}


def mean_nll(logits: Sequence[Tensor], probes: Sequence[Sequence[int]]) -> float:
    """Negative log-likelihood of the probes' own tokens, nats per token; logits [tokens, vocabulary] each."""
    losses = [
        F.cross_entropy(given[:-1].double(), torch.tensor(list(probe[1:])), reduction="sum")
        for given, probe in zip(logits, probes, strict=True)
    ]
    return float(sum(losses)) / sum(len(probe) - 1 for probe in probes)


def agreement(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Agreement:
    """Compare two sets of logits on the same probes; where one is not finite, they are infinitely far apart.

    >>> same = [torch.eye(3)]
    >>> agreement(same, same).mean_kl
    0.0
    """
    if reference[0].shape[-1] == 1:
        ours, theirs = torch.cat(list(reference)).double(), torch.cat(list(other)).double()
        compared = [_Compared.of(_as_choices(ours, ours), _as_choices(theirs, ours))]
        difference = float((ours - theirs).abs().max())
    else:  # probe by probe: those of a large vocabulary in 64 bits would take more memory than the model
        pairs = list(zip(reference, other, strict=True))
        compared = [_Compared.of(one.double(), two.double()) for one, two in pairs]
        difference = max(float((one.double() - two.double()).abs().max()) for one, two in pairs)
        if any(math.isnan(one.kl) for one in compared):
            difference = math.nan
    kl = sum(one.kl for one in compared) / sum(one.positions for one in compared)
    decided = sum(one.decided for one in compared)
    return Agreement(
        probes=len(reference),
        tokens=sum(len(one) for one in reference),
        # NaN compares as false with everything: it must count as far apart, not as equal.
        mean_kl=math.inf if math.isnan(kl) else max(0.0, kl),
        top1=sum(one.same for one in compared) / decided if decided else 1.0,
        largest_logit_difference=math.inf if math.isnan(difference) else difference,
    )


@dataclass(frozen=True)
class _Compared:
    """Sums over the positions of some probes."""

    positions: int
    kl: float
    decided: int
    same: int

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> _Compared:
        """Shapes: [positions, choices], both in float64."""
        p, q = F.log_softmax(ours, dim=-1), F.log_softmax(theirs, dim=-1)
        best = p.topk(2, dim=-1).values
        decided = best[:, 0] - best[:, 1] >= DECIDED
        same = (p.argmax(-1) == q.argmax(-1)) & decided
        kl = float((p.exp() * (p - q)).sum())
        return cls(len(ours), kl, int(decided.sum()), int(same.sum()))


def _as_choices(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers [N, 1] as the choice which of two is larger, for all pairs of them and the mean of `like`:
    [pairs, 2]. Numbers have no scale of their own: they are counted in the spread of `like`."""
    spread = like.std(correction=0)
    values = torch.cat((numbers.flatten(), like.mean().reshape(1))) / torch.where(spread > 0, spread, 1.0)
    first, second = torch.triu_indices(len(values), len(values), offset=1)
    return torch.stack((values[first], values[second]), dim=1)
