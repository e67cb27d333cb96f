"""Kept layer inputs in host memory: copied away beside the forward pass, back one layer ahead of backward.

Both ways run on a stream of their own, so that the copies hide behind the computation of a layer. Two
inputs are on the accelerator at a time: the one in use, and the one that is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LEAST = 2**20
"""Bytes below which a tensor stays where it is."""


@dataclass
class _Away:
    """A tensor in host memory, and its place in the order of the forward pass."""

    host: Tensor
    device: torch.device
    copied: torch.cuda.Event
    before: _Away | None
    """The one that forward put away just before: backward wants it next."""
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None


@dataclass
class HostCopies:
    """The inputs of one model's layers, by the order in which they were put away."""

    _streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)
    _last: _Away | None = None

    def around(self) -> saved_tensors_hooks:
        """A context in which large saved tensors on a GPU are put away."""
        return saved_tensors_hooks(self._put_away, self._bring_back)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _put_away(self, tensor: Tensor) -> Tensor | _Away:
        is_small = tensor.numel() * tensor.element_size() < LEAST
        if tensor.device.type != "cuda" or is_small or isinstance(tensor, torch.nn.Parameter):
            return tensor
        stream = self._stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(tensor.detach(), non_blocking=True)
            copied = stream.record_event()
        tensor.record_stream(stream)  # its memory is not given away before the copy has read it
        self._last = _Away(host, tensor.device, copied, self._last)
        return self._last

    def _bring_back(self, saved: Tensor | _Away) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._last = None  # backward has begun: the chain is over
        self._start(saved)
        if saved.before is not None:
            self._start(saved.before)
        assert saved.back is not None and saved.arrived is not None
        current = torch.cuda.current_stream(saved.device)
        current.wait_event(saved.arrived)
        saved.back.record_stream(current)
        back, saved.back, saved.before = saved.back, None, None
        return back

    def _start(self, saved: _Away) -> None:
        if saved.back is not None:
            return
        stream = self._stream(saved.device)
        with torch.cuda.stream(stream):
            stream.wait_event(saved.copied)
            saved.back = saved.host.to(saved.device, non_blocking=True)
            saved.arrived = stream.record_event()
