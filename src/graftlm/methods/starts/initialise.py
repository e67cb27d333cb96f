"""How the two factors of a LoRA start. Some of these read the base's weight, none edits it.

A start whose product is not zero (PiSSA, OLoRA) is meant to be subtracted from the base. Here the adapter
keeps the factors it started from instead (`Origin`) and applies the difference of the two products: the same
function of the same parameters, while the base stays whole and the adapter can be taken off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from graftlm.core.config import Config, suggest
from graftlm.core.errors import ConfigError
from graftlm.core.notices import notice
from graftlm.quant.weights import widened

PISSA_FAST = re.compile(r"pissa_niter_([1-9]\d*)")
Shape = tuple[int, int]
"""(out, in) of the base's weight."""


@dataclass(frozen=True)
class Start:
    """The factors before training. Shapes: a [r, in], b [out, r]."""

    a: Tensor
    b: Tensor
    is_subtracted: bool = False
    """Whether the product is taken off again, so that the adapted layer starts as the base."""


def start(init: bool | str, shape: Shape, r: int, scaling: float, weight: Tensor | None = None) -> Start:
    """The factors that `init_lora_weights` names; random ones are drawn from torch's global generator.

    `weight` is the base's as [out, in], for the starts that read it (`subtracts`).

    Raises:
        ConfigError: the layer has not as many directions as the rank.

    >>> begin = start(True, (3, 5), 2, scaling=1.0)
    >>> begin.a.shape, begin.b.abs().sum()
    (torch.Size([2, 5]), tensor(0.))
    """
    if init == "gaussian":
        return gaussian(shape, r)
    if init == "orthogonal":
        return orthogonal(shape, r)
    if weight is not None and subtracts(init):
        return _from_weight(str(init), shape, r, scaling, weight)
    return both_random(shape, r) if init is False else kaiming(shape, r)


def start_of_table(
    init: bool | str, shape: Shape, r: int, scaling: float, weight: Tensor | None = None
) -> Start:
    """The factors for an embedding table (`shape` [dim, vocabulary], `weight` as the table lies): zero a and
    normal b, unless the start reads the weight."""
    if weight is not None and subtracts(init):
        return _from_weight(str(init), shape, r, scaling, weight.t())
    dim, vocabulary = shape
    a = torch.randn(r, vocabulary) if init is False else torch.zeros(r, vocabulary)
    return Start(a, torch.randn(dim, r))


def kaiming(shape: Shape, r: int) -> Start:
    """Uniform a as `nn.Linear` starts, zero b (Hu et al. 2021, arXiv 2106.09685)."""
    out_features, in_features = shape
    a = torch.empty(r, in_features)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return Start(a, torch.zeros(out_features, r))


def gaussian(shape: Shape, r: int) -> Start:
    """Normal a of deviation 1 / r, zero b."""
    out_features, in_features = shape
    return Start(nn.init.normal_(torch.empty(r, in_features), std=1 / r), torch.zeros(out_features, r))


def both_random(shape: Shape, r: int) -> Start:
    """A change from the first moment on, for tests."""
    plain = kaiming(shape, r)
    nn.init.kaiming_uniform_(plain.b, a=math.sqrt(5))
    return plain


def orthogonal(shape: Shape, r: int) -> Start:
    """Neither factor is zero, their product is: each lives in one half of a basis of the r ranks.

    As PEFT defines `orthogonal`, number for number from the same random state.
    """
    require_rank("orthogonal", r)
    out_features, in_features = shape
    basis: Tensor = torch.linalg.qr(torch.randn(r, r))[0]
    a = (torch.randn(in_features, r // 2) @ basis[0::2]).t() / 10
    b = torch.randn(r // 2, out_features).t() @ basis[1::2] / 10
    return Start(a.contiguous(), b.contiguous())


def pissa(weight: Tensor, r: int, scaling: float) -> Start:
    """The r principal singular directions of the weight (Meng et al. 2024, arXiv 2404.02948)."""
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    return shared_out(u[:, :r], values[:r] / scaling, vh[:r])


def pissa_fast(weight: Tensor, r: int, scaling: float, iterations: int) -> Start:
    """`pissa` by a randomised SVD with that many power iterations: seconds for a large layer, not minutes."""
    u, values, v = torch.svd_lowrank(weight, q=r, niter=iterations)
    return shared_out(u, values / scaling, v.t())


def olora(weight: Tensor, r: int) -> Start:
    """The first r columns and rows of the weight's QR decomposition (Büyükakyüz 2024, arXiv 2406.01775)."""
    q, upper = torch.linalg.qr(weight)
    return Start(upper[:r].contiguous(), q[:, :r].contiguous(), is_subtracted=True)


def shared_out(u: Tensor, values: Tensor, vh: Tensor) -> Start:
    """Singular values shared out evenly between the factors."""
    root = values.sqrt()
    return Start((root[:, None] * vh).contiguous(), (u * root).contiguous(), is_subtracted=True)


@torch.no_grad()
def _from_weight(init: str, shape: Shape, r: int, scaling: float, weight: Tensor) -> Start:
    if r > min(shape):
        raise ConfigError(
            f"init_lora_weights={init!r} takes r directions of a weight, and r is {r}.",
            meaning=f"A weight of shape {list(shape)} has only {min(shape)}.",
            fix=f"Choose r <= {min(shape)}, exclude the layer, or use init_lora_weights=True.",
        )
    if weight.dtype.itemsize < 2 or not weight.is_floating_point():
        raise ConfigError(
            f"init_lora_weights={init!r} reads the base's weight, which is stored as {weight.dtype}.",
            fix="Use another start, or load the base in bfloat16.",
        )
    weight = widened(weight)
    if weight.is_meta:  # only counted, not made
        return Start(weight.new_empty(r, shape[1]), weight.new_empty(shape[0], r), is_subtracted=True)
    if fast := PISSA_FAST.fullmatch(init):
        return pissa_fast(weight, r, scaling, int(fast[1]))
    return pissa(weight, r, scaling) if init == "pissa" else olora(weight, r)


class Origin(nn.Module):
    """The factors that training started from, frozen. The change of weights is B A - B0 A0.

    It is evaluated as (B - B0) A + B0 (A - A0): exactly zero at the start, and in 16 bits its rounding is
    relative to the change, not to the principal part of the weight that A0 and B0 hold.
    """

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.register_buffer("a", start.a.clone(), persistent=False)
        self.register_buffer("b", start.b.clone(), persistent=False)
        self.a: Tensor
        self.b: Tensor

    def change(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [2r, in] and [out, 2r] of the change; a plain LoRA of twice the rank."""
        return torch.cat([a, a - self.a]), torch.cat([b - self.b, self.b], dim=1)

    @torch.no_grad()
    def restore(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `change`: sets the origin, and gives the trained factors [r, in] and [out, r]."""
        r = a.shape[0] // 2
        self.a.copy_(a[:r] - a[r:])
        self.b.copy_(b[:, r:])
        return a[:r], b[:, :r] + b[:, r:]


def subtracts(init: bool | str) -> bool:
    """Whether the start has a product that is taken off again.

    >>> subtracts("pissa_niter_4"), subtracts("gaussian")
    (True, False)
    """
    return isinstance(init, str) and (init in ("pissa", "olora") or PISSA_FAST.fullmatch(init) is not None)


def doubled(
    r: int, alpha: float, ranks: Mapping[str, int], alphas: Mapping[str, float], *, use_rslora: bool
) -> dict[str, object]:
    """Fields of the plain LoRA config that goes with `Origin.change`: twice the rank, the same scaling."""
    factor = math.sqrt(2) if use_rslora else 2
    return {
        "r": 2 * r,
        "lora_alpha": factor * alpha,
        "rank_pattern": {key: 2 * value for key, value in ranks.items()},
        "alpha_pattern": {key: factor * value for key, value in alphas.items()},
        "init_lora_weights": True,
    }


NAMES = ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "eva", "loftq")


def checked(init: bool | str) -> bool | str:
    """A value of `init_lora_weights` as it is spelled here.

    Raises:
        ValueError: no such start; for pydantic.
    """
    if isinstance(init, bool):
        return init
    name = init.lower()
    if name not in NAMES[:3] + NAMES[4:] and not PISSA_FAST.fullmatch(name):
        raise ValueError(
            f"no such start{suggest(name, NAMES)}; use true, false, {', '.join(NAMES)} (N power iterations)"
        )
    return name


def require_rank(init: bool | str, r: int) -> None:
    """Refuse a rank that a start cannot have; ValueError, for pydantic."""
    if init == "orthogonal" and r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, not {r}")


class EvaConfig(Config):
    """How EVA reads data, with PEFT's names and meanings."""

    rho: float = Field(2.0, ge=1.0)
    """No layer gets a rank of more than rho * r; 1 deals no ranks out anew."""
    tau: float = Field(0.99, ge=0.0, le=1.0)
    """A direction stands still when one more batch turns it by no less a cosine than this."""
    use_label_mask: bool = True
    """Leave out tokens that are not learned."""
    label_mask_value: int = -100
    """The label of those tokens."""
    whiten: bool = False
    """Divide each direction by the root of its singular value."""
    adjust_scaling_factors: bool = True
    """Give a layer whose rank changed the alpha that keeps its scaling."""


class LoftQConfig(Config):
    """How LoftQ corrects a quantised base, with PEFT's names."""

    loftq_bits: Literal[4, 8] = 4
    """What the base is stored in."""
    loftq_iter: int = 1
    """Steps of correcting; each after the first would quantise the base anew."""

    @field_validator("loftq_iter")
    @classmethod
    def _one(cls, value: int) -> int:
        if value != 1:
            raise ValueError("can only be 1: more would replace the base, which is never edited here")
        return value


def say_loftq_needs_originals() -> None:
    """LoftQ starts from weights that a quantised base no longer has."""
    notice(
        "init_lora_weights='loftq' starts like a plain LoRA until it has seen the weights before quantising:"
        " use graftlm.attach, or graftlm.methods.starts.loftq.correct_quantisation(adapters, name, original)."
    )


def say_eva_needs_data() -> None:
    """EVA starts from data, which attaching alone does not have."""
    notice(
        "init_lora_weights='eva' starts like a plain LoRA until it has seen data: before training, call"
        " graftlm.methods.starts.eva.initialise_from_data(adapters, name, batches)."
    )
