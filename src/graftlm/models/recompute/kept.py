"""How many bytes a forward pass keeps for its backward, counted tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Counted:
    """Bytes of what autograd saved, each memory once, without the parameters and buffers of the model."""

    def __init__(self, model: nn.Module) -> None:
        held = (*model.parameters(), *model.buffers())
        self._of_model = {_place(tensor) for tensor in held}
        self._sizes: dict[tuple[torch.device, int], int] = {}
        self._alive: list[Tensor] = []

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self._sizes.values())

    def add(self, tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in self._of_model and place not in self._sizes:
            self._sizes[place] = tensor.untyped_storage().nbytes()
            self._alive.append(tensor.detach())  # so that its place is not used again
        return tensor


@contextmanager
def counted(model: nn.Module) -> Iterator[Counted]:
    """Inside, what is saved for backward is counted.

    >>> layer = nn.Linear(4, 4)
    >>> with counted(layer) as found: out = layer(torch.ones(3, 4)).relu()
    >>> found.total  # the input and what relu gives, 3 x 4 values each
    96
    """
    found = Counted(model)
    with torch.autograd.graph.saved_tensors_hooks(found.add, lambda tensor: tensor):
        yield found


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
