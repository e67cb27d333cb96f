"""Tuning of the base's own parameters, as adapters: all of them, the biases only, or the norms only.

The baselines of parameter-efficient tuning. What is trained is a copy, so that the base stays what it was:
switching off, comparing, saving and going back work as for every method. Biases only: BitFit (Ben Zaken et
al. 2022, arXiv 2106.10199). Norms only: Zhao et al. 2024 (arXiv 2312.11420).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn

from graftlm.core.errors import TargetError
from graftlm.methods.base import Layer, Maker, MethodConfig, Part
from graftlm.methods.bias import BiasShift, has_bias
from graftlm.methods.copies import FullCopy, keep_ties, owners, refuse_packed
from graftlm.methods.site import base_modules


class FullConfig(MethodConfig):
    """Full fine-tuning (`parts="all"`) and selective tuning.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    >>> list(FullConfig(parts="norms").places(model))
    ['1']
    """

    peft_type: ClassVar[str] = "FULL"

    parts: Literal["all", "biases", "norms"] = "all"
    """Every parameter of the model, every bias at the end of a layer, or the normalisation layers."""

    @property
    def rate_scale(self) -> float:
        return {"all": 0.2, "biases": 15.0, "norms": 15.0}[self.parts]

    def places(self, model: nn.Module) -> Mapping[str, Maker]:
        modules = base_modules(model)
        if self.parts == "biases":
            chosen: dict[str, Maker] = {path: _bias for path, m in modules.items() if has_bias(m)}
        elif self.parts == "norms":
            chosen = {path: _copy for path, m in modules.items() if is_norm(m)}
        else:
            refuse_packed(modules)
            chosen = dict.fromkeys(owners(modules), _copy)
        if not chosen:
            raise TargetError(
                f"This model has no {self.parts} to train.",
                meaning="Many current models have no biases, for instance.",
                fix="Choose another value of parts, or another method.",
            )
        return chosen

    def link(self, parts: Mapping[str, Part]) -> None:
        keep_ties(parts.values())


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer with parameters, of torch or of any model.

    >>> is_norm(nn.LayerNorm(4)), is_norm(nn.Linear(4, 4))
    (True, False)
    """
    return "norm" in type(module).__name__.lower() and any(p is not None for p in module._parameters.values())


def _bias(layer: Layer) -> Part:
    return BiasShift(layer.module.get_parameter("bias"))


def _copy(layer: Layer) -> Part:
    return FullCopy(layer.module)
