"""The compiled dropout, called with tensors. `dropout` is its definition."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graftlm.kernels.native.opening import opened

Chance = tuple[int, int]
"""How many of 65536 numbers mean "dropped", and the seed."""

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


def dropped_lanes(x: Tensor, chances: Mapping[int, Chance]) -> Tensor | None:
    """`dropped` of those x[lane] that have a chance, beside the others; None where it cannot run."""
    loaded = _library() if x.element_size() in (2, 4) and x.is_cpu and x.is_contiguous() else None
    if loaded is None:
        return None
    out = torch.empty_like(x)
    for lane in range(len(x)):
        if lane in chances:
            _call_lane(loaded.graft_dropped, out, x, lane, chances[lane])
        else:
            out[lane] = x[lane]
    return out


def add_dropped_lanes(out: Tensor, x: Tensor, chances: Mapping[int, Chance]) -> bool:
    """The same of `add_dropped`; False, and nothing done, where it cannot run."""
    fits = out.dtype == x.dtype and x.dtype in (torch.bfloat16, torch.float32) and out.is_contiguous()
    loaded = _library() if fits and x.is_cpu and x.is_contiguous() else None
    if loaded is None:
        return False
    for lane in range(len(x)):
        if lane in chances:
            _call_lane(loaded.graft_add_dropped, out, x, lane, chances[lane])
        else:
            out[lane] += x[lane]
    return True


def _call_lane(function: ctypes._NamedFuncPointer, out: Tensor, x: Tensor, lane: int, chance: Chance) -> None:
    size, (limit, seed) = x.element_size(), chance
    skipped = lane * x.stride(0) * size
    function(
        *(out.data_ptr() + skipped, x.data_ptr() + skipped, x.shape[1], x.shape[2], size),
        *(seed, limit, torch.get_num_threads()),
    )


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
