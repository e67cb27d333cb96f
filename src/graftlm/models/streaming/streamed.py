"""A base that does not fit in memory: its layers come when a pass needs them, and go when it has passed.

The layers are asked for in the order of the pass: forwards in the forward pass, backwards in the backward
pass, one ahead. The last layer of a forward pass is the first of the backward pass, so nothing is moved at
the turn. What is moved are bytes: every value computed is the same as with the whole base in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, ModelError
from graftlm.quant.module import PackedModule

RESIDENT, DISK, HOST = "resident", "disk", "host"
PLACEMENTS = (RESIDENT, DISK, HOST)
"""Where the layers of a base may lie while a pass does not need them."""

_ATTRIBUTE = "_graft_streaming"


class Mover(Protocol):
    """Brings the weights of a layer, by its number, to where they are computed with."""

    @property
    def placement(self) -> str:
        """`"disk"` or `"host"`."""
        ...

    @property
    def why(self) -> str:
        """What lies where, and what a pass costs, as a person reads it."""
        ...

    def require_intact(self) -> None:
        """Raise if the weights are not what they were when streaming began."""
        ...

    def fetch(self, layer: int) -> None:
        """Begin to bring it; returns without waiting."""
        ...

    def settle(self, layer: int) -> None:
        """Wait until it is there."""
        ...

    def keep(self, layers: Collection[int]) -> None:
        """All others are not needed for now."""
        ...


class Streaming:
    """Hooks on the layers that move their weights: those of the layer at work and of the next one are there,
    no others."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], mover: Mover) -> None:
        self.mover = mover
        self.held: set[int] = set()
        self._count = len(layers)
        self._now, self._step = 0, 1
        model.register_forward_pre_hook(self._begin)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._forward, number))
            layer.register_forward_hook(partial(self._watch, number))

    def release_all(self) -> None:
        """Let go of every layer, also of what others than a pass have read."""
        self.mover.keep(())
        self.held.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Streaming:
        """A copied layer holds copies of the weights; the hooks that are copied with it have these layers."""
        return self

    def _begin(self, model: nn.Module, args: Any) -> None:
        self.mover.require_intact()

    def _forward(self, number: int, layer: nn.Module, args: Any) -> None:
        if number != self._now:  # a recomputation in the backward pass begins at the layer that it is at
            self._step = 1
        self._arrive(number)

    def _watch(self, number: int, layer: nn.Module, args: Any, output: Any) -> None:
        """The gradient of its output is the first that the backward pass computes of a layer."""
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(partial(self._backward, number))

    def _backward(self, number: int, gradient: Tensor) -> None:
        self._step = -1
        self._arrive(number)

    def _arrive(self, number: int) -> None:
        self._now = number
        wanted = (number, self._after(number))
        self.mover.keep(wanted)
        self.held.intersection_update(wanted)
        for new in wanted:
            if new not in self.held:
                self.mover.fetch(new)
                self.held.add(new)
        self.mover.settle(number)
        self.mover.keep(wanted)  # again: a system may bring more than it is asked for

    def _after(self, number: int) -> int:
        """The layer that comes next. At its end a pass turns back; one without gradients begins again."""
        following = number + self._step
        if 0 <= following < self._count:
            return following
        if self._step > 0 and not torch.is_grad_enabled():
            return 0
        return max(0, min(self._count - 1, number - self._step))


def begin_streaming(model: nn.Module, mover: Mover) -> Streaming:
    """Stream `streamed_layers(model)`; the model remembers it."""
    streaming = Streaming(model, streamed_layers(model), mover)
    vars(model)[_ATTRIBUTE] = streaming
    streaming.release_all()
    return streaming


def streaming_of(model: nn.Module) -> Streaming | None:
    """How the layers of a model are streamed; None where all of it is in memory."""
    found: Streaming | None = vars(model).get(_ATTRIBUTE)
    return found


def placement_of(model: nn.Module) -> tuple[str, str]:
    """Where the layers of a base lie, and what that means."""
    streaming = streaming_of(model)
    if streaming is None:
        return RESIDENT, "the whole base is in memory"
    return streaming.mover.placement, streaming.mover.why


def streamed_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a `transformers` model in their order: what it can recompute one by one.

    Raises:
        ModelError: it has none.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(
            path.startswith(f"{outer}.") for outer in found
        ):
            found[path] = module
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layers that could be streamed.",
            meaning="Its architecture does not mark them (GradientCheckpointingLayer of transformers).",
            fix="Leave placement out: the whole base is then held in memory.",
        )
    return list(found.values())


def streamed_tensors(layer: nn.Module) -> list[Tensor]:
    """The weights of a layer that are moved: its matrices and whatever belongs to a packed one. Norms and
    biases always stay in memory.

    >>> [tuple(tensor.shape) for tensor in streamed_tensors(nn.Linear(2, 3))]
    [(3, 2)]
    """
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() > 1]
    packed = [tensor for module in layer.modules() if isinstance(module, PackedModule)
              for tensor in module.packed.tensors.values() if tensor.dim()]  # fmt: skip
    return matrices + packed


def check_placement(placement: str, device: torch.device) -> None:
    """Refuse what cannot be, before anything is loaded.

    Raises:
        ConfigError: an unknown placement, or one that the device has no use for.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(
            f"placement={placement!r} is no place for a base{suggest(placement, PLACEMENTS) or '.'}",
            fix=f"Use one of {', '.join(PLACEMENTS)}.",
        )
    if placement == DISK and device.type != "cpu":
        raise ConfigError(
            f"placement='disk' computes on the CPU, and the device is {device}.",
            meaning="A GPU cannot compute with weights in a file.",
            fix="placement='host' keeps the layers in the machine's memory; or compute with device='cpu'.",
        )
    if placement == HOST and device.type == "cpu":
        raise ConfigError(
            "placement='host' keeps the layers in the machine's memory for a GPU, and the device is the CPU.",
            fix="placement='disk' if the base does not fit in memory, else leave it out.",
        )
