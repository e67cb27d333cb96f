"""(IA)^3: learned factors on keys, values and what the feed-forward part computes inside (Liu et al. 2022).

keys, values:   y = l * (W x + b)       feed-forward:   y = W (l * x) + b       arXiv 2205.05638

The product is taken in the factors' own float32 and rounded once to the base's dtype: in bfloat16 the numbers
next to 1 are 1/128 apart, more than most factors ever move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import Tensor, nn

from graftlm.core.errors import TargetError
from graftlm.kernels.gain import with_gain
from graftlm.methods import targets
from graftlm.methods.base import Dense, Layer, LayerAdapter, Maker, SiteAdapter
from graftlm.methods.families import is_linear, roles_of, shape_of
from graftlm.methods.layer_config import LayerConfig

FEED_FORWARD = "mlp-output"


class IA3Config(LayerConfig):
    """(IA)^3 on linear layers and GPT-2's Conv1D.

    The defaults are the paper's: keys, values, and the layer that ends the feed-forward part, found by
    structure. Where queries, keys and values come from one layer, its whole output is scaled.

    >>> IA3Config().target_modules
    ('keys', 'values', 'mlp-output')
    """

    peft_type: ClassVar[str] = "IA3"

    target_modules: str | tuple[str, ...] = ("keys", "values", FEED_FORWARD)
    """Where the factors go: roles, module names or endings of them, or one regular expression."""
    feedforward_modules: str | tuple[str, ...] = FEED_FORWARD
    """Which of them scale their input instead of their output; same grammar, `()` for none."""
    init_ia3_weights: bool = True
    """True: all factors are 1, so that nothing changes at first. False: random (tests)."""

    @property
    def rate_scale(self) -> float:
        """Measured (docs/results/methods.md); the paper's 3e-3 is 15 times LoRA's usual 2e-4."""
        return 30.0

    @field_validator("feedforward_modules", mode="before")
    @classmethod
    def _feedforward_is_sorted(cls, value: Any) -> Any:
        if value is None:
            return FEED_FORWARD
        return tuple(sorted(value)) if isinstance(value, set | frozenset) else value

    def supports(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, layer: Layer) -> SiteAdapter:
        return self._initialised(IA3Output(shape_of(layer.module)[0]))

    def extra(self, model: nn.Module, chosen: Sequence[str]) -> Mapping[str, Maker]:
        return dict.fromkeys(self.feed_forwards(model, chosen), self._build_input)

    def feed_forwards(self, model: nn.Module, chosen: Sequence[str]) -> tuple[str, ...]:
        """Those of the `chosen` layers that scale their input.

        Raises:
            TargetError: `feedforward_modules` names layers that are not among them.
        """
        if not self.feedforward_modules:
            return ()
        if self.feedforward_modules == FEED_FORWARD:
            found = set(roles_of(model)[FEED_FORWARD])
        else:
            everywhere = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
            found = {
                *targets.select(model, self.replace(target_modules=self.feedforward_modules, **everywhere))
            }
        inner = tuple(path for path in chosen if path in found)
        if not inner and self.feedforward_modules != FEED_FORWARD:
            raise TargetError(
                f"feedforward_modules {self.feedforward_modules!r} names none of the target modules.",
                meaning="It says which of the target modules scale their input instead of their output.",
                fix="Name some of target_modules, or write () for none.",
            )
        return inner

    def _build_input(self, layer: Layer) -> SiteAdapter:
        return self._initialised(IA3Input(shape_of(layer.module)[1]))

    def _initialised(self, part: IA3Output | IA3Input) -> SiteAdapter:
        if not self.init_ia3_weights:
            nn.init.normal_(part.ia3_l)
        return part


class IA3Output(LayerAdapter):
    """Scales what a layer gives, its bias included. Shape: ia3_l [out, 1]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(features, 1))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return scaled(y, self.ia3_l.flatten())

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        factors = self.ia3_l.flatten()
        changed = {"weight": dense["weight"] * factors[:, None].to(dense["weight"].dtype)}
        if "bias" in dense:
            changed["bias"] = dense["bias"] * factors.to(dense["bias"].dtype)
        return changed


class IA3Input(LayerAdapter):
    """Scales what a layer gets. Shape: ia3_l [1, in]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(1, features))

    def pre(self, x: Tensor) -> Tensor:
        return scaled(x, self.ia3_l.flatten())

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {"weight": dense["weight"] * self.ia3_l.to(dense["weight"].dtype)}


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """`x * factors` along the last axis, in the wider of both dtypes, rounded once to that of `x`."""
    is_narrow = torch.promote_types(x.dtype, factors.dtype) != x.dtype
    if not is_narrow or torch.compiler.is_compiling():  # a compiler chooses by itself what to keep
        return (x * factors).to(x.dtype)
    return with_gain(x, factors)
