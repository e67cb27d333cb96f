"""The bytes that are alive while a computation goes on, storage by storage; also of tensors without data.

Tensors without data (`FakeTensor`) take the way through every operator that tensors with data take, and have
the same shapes, so that a whole training step can be rehearsed in the memory of its bookkeeping. Where code
asks for a value, there is none: what is asked is whether two results agree, and here they do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VALUE = torch.ops.aten._local_scalar_dense.default
_BY_MASK = torch.ops.aten.index.Tensor
_AGREEMENT = (torch.ops.aten.equal.default, torch.ops.aten.allclose.default)


class Ledger(TorchDispatchMode):
    """Inside, every new storage is counted until it is gone.

    >>> with Ledger() as ledger:
    ...     big = torch.empty(1000, dtype=torch.float32)
    ...     del big
    >>> ledger.live, ledger.peak
    (0, 4000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes of the storages that were made inside and are still there."""
        self.peak = 0
        """The most that there ever were at a time since `mark`."""
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()

    def knows(self, *tensors: Tensor) -> None:
        """These were there before and count as nothing; they must outlive the ledger."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def mark(self) -> int:
        """The peak begins anew from what is alive now; returns the old one."""
        before, self.peak = self.peak, self.live
        return before

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _AGREEMENT and any(isinstance(arg, FakeTensor) for arg in args[:2]):
            return True
        if func is _VALUE and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        if func is _BY_MASK and isinstance(args[0], FakeTensor):
            args = (args[0], _places(args[1]))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._sizes or place in self._known:
            return
        self._sizes[place] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self.live -= self._sizes.pop(place, 0)


def _places(index: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks with values as the places that they choose, whose number a tensor without values can have too."""
    places: list[Tensor | None] = []
    for one in index:
        is_mask = one is not None and one.dtype == torch.bool and not isinstance(one, FakeTensor)
        places += one.nonzero(as_tuple=True) if is_mask and one is not None else [one]
    return places
