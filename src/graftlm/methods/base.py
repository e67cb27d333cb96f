"""What a method is: a frozen config that says where an adapter goes, and makes its part for each place.

`Part` is what one adapter has at one place of the model. Most methods derive from `LayerAdapter` and fill in
`pre`, `post` and `merged`; none of them knows of other adapters, of quantisation, saving or training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn
from torch.func import functional_call

from graftlm.core.config import Config
from graftlm.core.errors import MergeError
from graftlm.kernels.adapted import Adapted, Frozen
from graftlm.quant.facts import device_of, dtype_of
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
        return device_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are stored in, or read in where they are packed."""
        return dtype_of(self.module)


class Part(nn.Module, ABC):
    """What one adapter has at one place of the model."""

    output_side: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters next to the output, which LoRA+ trains faster (arXiv 2402.12354)."""

    def saved(self) -> dict[str, Tensor]:
        """What a file holds of this part, by name: its parameters, unless a method stores plainer ones."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `saved`, for the names that are given."""
        for name, tensor in tensors.items():
            self.get_parameter(name).copy_(tensor)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        """The parameters of the base layer that change, with this adapter folded in.

        Raises:
            MergeError: the method is not a change of weights.
        """
        raise MergeError(
            f"{type(self).__name__} cannot be merged.",
            meaning="It is no change of weights.",
            fix="Serve it unmerged.",
        )


class SiteAdapter(Part):
    """A part at one layer. `forward` receives the base layer and its input, and returns the output."""

    is_additive: ClassVar[bool] = False
    """True if the output is the base's output plus something that depends on the input alone; the changes of
    several such adapters are then summed by applying one after the other."""

    @abstractmethod
    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any: ...

    def change_of(self, layer: Frozen, base: nn.Module) -> Adapted | None:
        """What `forward` computes, as the frozen `layer` that `base` is with a low-rank change, where it is
        one: that is computed in one go, and together with other layers that read the same input."""
        return None


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


class WeightAdapter(SiteAdapter):
    """A part that changes the parameters that the base layer is called with; several of them add up there."""

    @abstractmethod
    def changed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the base's `weights`, by name, that this part changes, with its change added."""

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return functional_call(base, self.changed(dict(base.named_parameters())), (x, *args), kwargs)


class ModelAdapter(Part):
    """A part that leaves every module in its place and acts through hooks, at a gate: on what a whole stack
    of layers reads (its input tokens, its cache), or on what an attention returns."""


Maker = Callable[[Layer], Part]
"""Makes the part of an adapter for one place, initialised."""

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


class MethodConfig(Config, ABC):
    """What every method shares, with PEFT's names and meanings."""

    peft_type: ClassVar[str]

    modules_to_save: tuple[str, ...] | None = None
    """Modules of which a full copy is trained and saved with the adapter, such as a new head."""
    task_type: TaskType | None = None
    """PEFT's name of the task, written to the adapter's file."""

    @property
    def rate_scale(self) -> float:
        """The learning rate that this method wants, as a multiple of LoRA's."""
        return 1.0

    @property
    def positions_taken(self) -> int:
        """Positions of the base's context that the adapter itself occupies."""
        return 0

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _saved_sets_are_sorted(cls, value: Any) -> Any:
        return tuple(sorted(value)) if isinstance(value, set | frozenset) else value

    @abstractmethod
    def places(self, model: nn.Module) -> Mapping[str, Maker]:
        """Where parts go, by module path, and what makes them. Pure.

        Raises:
            TargetError: everything that does not resolve, at once.
        """

    def link(self, parts: Mapping[str, Part]) -> None:
        """Called once, when the parts of one adapter were made: introduce those that work together."""

    def portable(self) -> MethodConfig:
        """The config of what `Part.saved` gives; differs where a file is plainer than training."""
        return self
