"""The compiled dropout, called with tensors. `dropout` is its definition."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graftlm.kernels.native.opening import opened

SOURCE = Path(__file__).parent / "native" / "dropout.c"


def dropped(x: Tensor, limit: int, seed: Tensor) -> Tensor | None:
    """As the operator; None where the compiled code cannot run."""
    loaded = _library() if x.element_size() in (2, 4) else None
    if loaded is None:
        return None
    x = x.contiguous()
    out = torch.empty_like(x)
    _call(loaded.graft_dropped, out, x, limit, seed)
    return out


def add_dropped(out: Tensor, x: Tensor, limit: int, seed: Tensor) -> bool:
    """As the operator; False, and nothing done, where the compiled code cannot run."""
    fits = out.dtype == x.dtype and x.dtype in (torch.bfloat16, torch.float32) and out.is_contiguous()
    loaded = _library() if fits else None
    if loaded is None:
        return False
    _call(loaded.graft_add_dropped, out, x.contiguous(), limit, seed)
    return True


def _call(function: ctypes._NamedFuncPointer, out: Tensor, x: Tensor, limit: int, seed: Tensor) -> None:
    function(
        *(out.data_ptr(), x.data_ptr(), *x.shape, x.element_size()),
        *(int(seed.item()), limit, torch.get_num_threads()),
    )


@cache
def _library() -> ctypes.CDLL | None:
    return opened(SOURCE, _load, "Dropout is drawn by plain torch, at a fraction of the speed.")


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for function in (loaded.graft_dropped, loaded.graft_add_dropped):
        function.argtypes = (pointer, pointer, size, size, number, size, number, number)
        function.restype = None
    return loaded
