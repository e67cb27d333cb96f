"""What a method is: a frozen config that can make one adapter for one layer.

`SiteAdapter` is the contract of everything that lives at a site. Most methods derive from `LayerAdapter` and
fill in `pre`, `post` and `merged`; none of them knows of other adapters, of quantisation, saving or training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from graftlm.core.config import Config
from graftlm.core.errors import MergeError
from graftlm.quant.weights import WeightHandle

Dense = Mapping[str, Tensor]
"""Parameters of one base layer by name, float32 or float64, `weight` as [out, in]."""


@dataclass(frozen=True)
class Layer:
    """One place where an adapter can go: the path in the model and the base module there."""

    path: str
    module: nn.Module

    @property
    def handle(self) -> WeightHandle:
        return WeightHandle(self.module)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


class SiteAdapter(nn.Module, ABC):
    """One adapter at one site. `forward` receives the base layer and its input, and returns the output."""

    is_additive: ClassVar[bool] = False
    """True if the output is the base's output plus something that depends on the input alone; such adapters
    can be chained without evaluating the base layer again."""

    output_side: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters next to the output, which LoRA+ trains faster (arXiv 2402.12354)."""

    @abstractmethod
    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any: ...

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        """The parameters of the base layer that change, with this adapter folded in.

        Raises:
            MergeError: the method is not a change of weights.
        """
        raise MergeError(
            f"{type(self).__name__} cannot be merged.",
            meaning="It is not a change of the layer's weights.",
            fix="Serve it unmerged.",
        )


class LayerAdapter(SiteAdapter):
    """An adapter made of an input hook, an output hook, or both, around the base layer's own call."""

    def pre(self, x: Tensor) -> Tensor:
        """The input that the base layer gets."""
        return x

    @abstractmethod
    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, from the base layer's input and output."""

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.pre(x)
        return self.post(x, base(x, *args, **kwargs))


TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


class MethodConfig(Config):
    """Fields that every method on layers shares, with PEFT's names and meanings."""

    peft_type: ClassVar[str]

    target_modules: str | tuple[str, ...] = "all-linear"
    """Where the adapter goes: a role (`all-linear`, `attention`, `mlp`), a list of roles and of module names
    or endings of them, or one regular expression for the whole path."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Same grammar; wins over `target_modules`."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Only these layers, counted from 0."""
    layers_pattern: str | tuple[str, ...] | None = None
    """Name of the list of layers, for models where the first number of a path is something else."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules of which a full copy is trained and saved with the adapter, such as a new head."""
    task_type: TaskType | None = None
    """PEFT's name of the task, written to the adapter's file."""

    @field_validator("target_modules", "exclude_modules", "modules_to_save", mode="before")
    @classmethod
    def _sets_are_sorted(cls, value: Any) -> Any:
        return tuple(sorted(value)) if isinstance(value, set | frozenset) else value

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or any(not name for name in value):
            raise ValueError("names no module; use 'all-linear', a role, or module names")
        return value

    @abstractmethod
    def supports(self, module: nn.Module) -> bool:
        """Whether this method can adapt a module of this kind."""

    @abstractmethod
    def build(self, layer: Layer) -> SiteAdapter:
        """One adapter for one layer, initialised."""

    def extra(self, model: nn.Module, chosen: Sequence[str]) -> dict[str, Any]:
        """Further sites beside the `chosen` ones: path to a function that makes the adapter there."""
        return {}
