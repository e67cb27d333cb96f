"""One method on one kind of tiny model, and what it does not promise."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet, ParameterType
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.testing.models import batch, logits, tiny, unquantised

MOST = ("llama", "llama-tied", "gemma3", "bert", "roberta", "gpt2")
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    **{kind: {"initializer_range": 0.2} for kind in MOST},
    "bart": {"init_std": 0.2},
    "t5": {"num_layers": 1},
}
"""Weights with which the tiny bases say something: at the usual deviation of 0.02 attention is all but
uniform, and a change of keys or values is lost in rounding. T5 has many modules in a layer."""

ONE_LAYER = {
    **{kind: {"num_hidden_layers": 1} for kind in MOST},
    "gpt2": {"n_layer": 1},
}


@dataclass(frozen=True)
class Case:
    """A method's config, the kind of tiny model it goes to, and the properties that it does not have.

    >>> case = Case("llama", LoraConfig(r=4))
    >>> adapted = case.adapted()
    >>> adapted.adapters.names
    ('default',)
    """

    kind: str
    """One of `graftlm.testing.models.KINDS`, or of `QUANTISED` there."""
    config: MethodConfig
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """`property` or `property/kind` -> why the method does not have it."""

    def exception(self, name: str) -> str:
        """Why the method does not have the property of that name here, as declared; "" if it should."""
        keys = (f"{name}/{self.kind}", f"{name}/{self.family}", name)
        return next((self.exceptions[key] for key in keys if key in self.exceptions), "")

    @property
    def family(self) -> str:
        """The kind of model, whatever its weights are stored in."""
        return unquantised(self.kind)

    @property
    def other(self) -> MethodConfig:
        """A method of another type, to share a model and a batch with."""
        is_lora = isinstance(self.config, LoraConfig)
        return IA3Config() if is_lora else LoraConfig(r=2, lora_alpha=6, target_modules="attention")

    def base(self) -> Any:
        """A fresh tiny model, always with the same weights."""
        return copy.deepcopy(_base(self.kind))

    def shallow(self) -> Any:
        """A fresh model of one layer, for what takes seconds per layer."""
        return tiny(self.kind, **SETTINGS.get(self.family, {}), **ONE_LAYER.get(self.family, {}))

    def inputs(self, *, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
        """A batch with labels."""
        return batch(self.kind, rows=rows, seed=seed)

    def base_logits(self) -> Tensor:
        """What the tiny model says to `inputs()` without any adapter."""
        return _base_logits(self.kind)

    def adapted(self, *names: str, dtype: ParameterType = "float32", model: Any = None) -> Adapted:
        """A fresh model, or your own, with adapters of this method that visibly change it.

        Without names it is one adapter, `default`. The first is active and trainable; each has other weights.
        """
        fresh = self.untrained(*names, dtype=dtype, model=model)
        for seed, name in enumerate(fresh.adapters.names):
            stir(fresh.adapters, name, seed=seed)
        return fresh

    def untrained(self, *names: str, dtype: ParameterType = "float32", model: Any = None) -> Adapted:
        """The same with adapters as they are made."""
        model = self.base() if model is None else model
        first, *rest = names or ("default",)
        torch.manual_seed(1)
        adapters = attach(model, self.config, first, storage=FOLDER, dtype=dtype)
        for name in rest:
            adapters.add(name, self.config, dtype=dtype)
        return Adapted(model, adapters, self.inputs())


@dataclass(frozen=True)
class Adapted:
    """A tiny model with adapters on it, and a batch for it."""

    model: Any
    adapters: AdapterSet
    inputs: dict[str, Tensor]

    def logits(self, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """The model's logits, detached."""
        return logits(self.model, self.inputs if inputs is None else inputs)


@cache
def _base(kind: str) -> Any:
    return tiny(kind, **SETTINGS.get(unquantised(kind), {}))


@cache
def _base_logits(kind: str) -> Tensor:
    return logits(_base(kind), batch(kind))


@torch.no_grad()
def stir(adapters: AdapterSet, name: str = "default", *, seed: int = 0, size: float = 0.3) -> None:
    """Give an adapter weights that visibly change the model, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters(name):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_((size * noise / parameter.shape[-1] ** 0.5).to(parameter.dtype))
