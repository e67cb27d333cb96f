"""Layers that lie in the machine's memory and are copied to the GPU when a pass needs them.

The copies run on a stream of their own, one layer ahead of the computation, into two sets of buffers that are
used in turn. Not measured: written without a GPU at hand; tested with a second set of buffers on the CPU.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.models.streaming.streamed import HOST, begin_streaming, streamed_layers, streamed_tensors

_SLOTS = 2


@dataclass
class Slot:
    """Buffers for the tensors of one layer at a time, and when the computation had done with them."""

    buffers: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)
    free_since: Any = None
    """A CUDA event; None: nothing waits for these buffers."""

    def room(self, number: int, like: Tensor, device: torch.device) -> Tensor:
        """A buffer for the tensor of that number within its layer."""
        key = (like.dtype, number)
        held = self.buffers.get(key)
        if held is None or held.numel() < like.numel():
            held = self.buffers[key] = torch.empty(like.numel(), dtype=like.dtype, device=device)
        return held[: like.numel()].view(like.shape)


class HostMover:
    """Copies a layer's weights to the device ahead of their use. What lies in the host's memory is never
    written, so nothing is copied back."""

    placement = HOST

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, name: str) -> None:
        self.device = device
        self._used = [streamed_tensors(layer) for layer in layers]
        self._stored = [[_pinned(tensor, device) for tensor in tensors] for tensors in self._used]
        self._free = [Slot() for _ in range(_SLOTS)]
        self._slots: dict[int, Slot] = {}
        self._arrived: dict[int, Any] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in self._stored]
        self.why = (
            f"{len(layers)} layers of {name} ({sum(sizes) / 1e9:.2f} GB) lie in the machine's memory, "
            f"{_SLOTS} at a time ({_SLOTS * max(sizes) / 1e9:.2f} GB) on {device}; each pass, forward "
            "or backward, copies all of them (how long that takes is not measured)"
        )

    def require_intact(self) -> None:
        """Nothing but this process can change them."""

    def fetch(self, layer: int) -> None:
        """Start the copies on the side stream, after whatever still computes with the buffers."""
        slot = self._slots[layer] = self._free.pop()
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and slot.free_since is not None:
                self._stream.wait_event(slot.free_since)
            for number, (used, stored) in enumerate(zip(self._used[layer], self._stored[layer], strict=True)):
                buffer = slot.room(number, stored, self.device)
                buffer.copy_(stored, non_blocking=True)
                used.data = buffer
            if self._stream is not None:
                self._arrived[layer] = self._stream.record_event()

    def settle(self, layer: int) -> None:
        """The computation waits for the copies, the host for nothing."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[layer])

    def keep(self, layers: Collection[int]) -> None:
        """Give the buffers of all others to the next layer; their weights lie in the host's memory again.

        Autograd must not have kept a weight for later: its buffer will hold another layer. If it has, the
        backward pass now fails instead of being wrong.
        """
        for layer in [held for held in self._slots if held not in layers]:
            self._release(layer)

    def _release(self, layer: int) -> None:
        slot = self._slots.pop(layer)
        if self._stream is not None:
            slot.free_since = torch.cuda.current_stream(self.device).record_event()
        for used, stored in zip(self._used[layer], self._stored[layer], strict=True):
            torch.autograd.graph.increment_version(used)
            used.data = stored
        self._free.append(slot)


def stream_from_host(model: nn.Module, device: torch.device, name: str) -> None:
    """Move a model that was loaded on the CPU to `device`, except for the matrices of its layers."""
    layers = streamed_layers(model)
    for module in (inner for layer in layers for inner in layer.modules()):
        vars(module)["computes_on"] = device  # whatever the place of its weights at the moment
    moved = {id(tensor) for layer in layers for tensor in streamed_tensors(layer)}
    with torch.no_grad():
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in moved:
                    tensor.data = tensor.data.to(device)
    begin_streaming(model, HostMover(layers, device, name))


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """In memory that the device copies from by itself; it takes the place of the tensor's own."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor.data = tensor.data.pin_memory()
    return tensor.data
