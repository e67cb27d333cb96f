"""Random numbers drawn a second time, so that a repeated computation has the same dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """Where torch's generators stand now: that of the processor, and that of `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, what was drawn from here on is drawn again; afterwards the generators are where they were.

        >>> state = RandomState(torch.device("cpu"))
        >>> first = torch.rand(2)
        >>> with state.replayed(): torch.equal(torch.rand(2), first)
        True
        """
        now = RandomState(self._device)
        self._put_back()
        try:
            yield
        finally:
            now._put_back()

    def _put_back(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._of_device is not None:
            torch.cuda.set_rng_state(self._of_device, self._device)
