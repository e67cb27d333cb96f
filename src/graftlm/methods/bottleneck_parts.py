"""What stands at one place of a bottleneck adapter: the narrow network, and the tap that remembers an input.

change(h) = s * up(act(down(h)))        `up` starts at zero, so that nothing changes at first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import AdapterError, MergeError
from graftlm.methods.base import Dense, LayerAdapter

NonLinearity = Literal["relu", "gelu", "silu"]
Scaling = float | Literal["learned"]
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class NarrowPart(LayerAdapter):
    """A part of an adapter that is no change of weights."""

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        raise MergeError(
            "A bottleneck adapter cannot be merged.",
            meaning="It has a non-linearity between its two layers, so no change of weights equals it.",
            fix="Serve it unmerged, or train LoRA where a merged model is needed.",
        )


@dataclass(frozen=True)
class Shape:
    """What one narrow network is like; `features` is the width of the block."""

    features: int
    width: int
    non_linearity: NonLinearity = "relu"
    scaling: Scaling = 1.0
    dropout: float = 0.0


class Bottleneck(NarrowPart):
    """`y + change(y)` at the layer that ends a part of a block.

    Shapes: down.weight [width, features], up.weight [features, width], biases, scale [1] where it is learned.
    `down` starts as `nn.Linear` does, but for a bias of zero; `up` starts at zero.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(shape.features, shape.width), nn.Linear(shape.width, shape.features)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)
        self.function, self.dropout = FUNCTIONS[shape.non_linearity], shape.dropout
        self.scaling = 1.0 if shape.scaling == "learned" else shape.scaling
        self.scale = nn.Parameter(torch.ones(1)) if shape.scaling == "learned" else None

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(y)

    def change(self, h: Tensor) -> Tensor:
        """What is added, in the dtype of `h`; the factor is folded into `up` at full precision."""
        factor = self.scaling if self.scale is None else self.scale
        down, up = self.down, self.up
        hidden = self.function(F.linear(h, down.weight.to(h.dtype), down.bias.to(h.dtype)))
        change = F.linear(hidden, (up.weight * factor).to(h.dtype), (up.bias * factor).to(h.dtype))
        return F.dropout(change, self.dropout, self.training)


class Memory:
    """What a tap saw, until it is used. Plain, so that it belongs to neither part and is copied with both."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """The remembered tensor, forgotten here."""
        value, self.value = self.value, None
        if value is None:
            raise AdapterError(
                "The end of a feed-forward part ran without its beginning.",
                meaning="The model called the layers in another order than it lists them.",
                fix="Use placement='pfeiffer', or name the whole feed-forward modules in target_modules.",
            )
        return value


class InputTap(NarrowPart):
    """Remembers the input of the feed-forward part for the part at its end; changes nothing."""

    is_additive: ClassVar[bool] = True

    def __init__(self, ends: str) -> None:
        super().__init__()
        self.ends = ends
        self.memory = Memory()

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        self.memory.value = x
        return y


class ParallelBottleneck(Bottleneck):
    """`y + change(x)` at the end of the feed-forward part whose input `x` a tap remembered."""

    is_additive: ClassVar[bool] = True
    memory: Memory
    """That of the tap at the layer that begins the part."""

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(self.memory.take().to(y.dtype))


class ModuleBottleneck(Bottleneck):
    """At a whole module instead of a layer, such as a mixture of experts."""

    def __init__(self, shape: Shape, *, reads_input: bool) -> None:
        super().__init__(shape)
        self.reads_input = reads_input

    def post(self, x: Tensor, y: Any) -> Any:
        if isinstance(y, tuple):  # experts often give the scores of their router too
            return (self.post(x, y[0]), *y[1:])
        if y.numel() != x.numel():
            raise AdapterError(
                f"A module with a bottleneck adapter got {list(x.shape)} and gave {list(y.shape)}.",
                meaning="Its rows cannot be told apart, for instance because it flattens a routed batch.",
                fix="Run the rows of each adapter in a batch of their own, or leave its block out.",
            )
        return y + self.change(x.to(y.dtype).reshape(y.shape) if self.reads_input else y)
