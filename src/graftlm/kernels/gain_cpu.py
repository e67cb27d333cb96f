"""The compiled gain, called with tensors. `gain` is its definition."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graftlm.kernels.native.opening import opened

SOURCE = Path(__file__).parent / "native" / "gain.c"
BLOCK = 64
"""Rows whose sums are one partial sum, as gain.c has it."""


def apply(out: Tensor, x: Tensor, gain: Tensor, bias: Tensor | None) -> bool:
    """`out = x + (gain - 1) (x - bias)`; False, and nothing done, where the compiled code cannot run."""
    loaded = _library() if _fits(gain, out, x) else None
    if loaded is None:
        return False
    change = gain - 1
    wide = None if bias is None else bias.float().contiguous()
    loaded.graft_gain(
        *(out.data_ptr(), x.data_ptr(), change.data_ptr(), None if wide is None else wide.data_ptr()),
        *(*x.shape, x.element_size(), torch.get_num_threads()),
    )
    return True


def apply_to_rows(out: Tensor, x: Tensor, gain: Tensor) -> bool:
    """`out_n = gain_n x_n`; False, and nothing done, where the compiled code cannot run."""
    loaded = _library() if _fits(gain, out, x) else None
    if loaded is None:
        return False
    loaded.graft_gain_on_rows(
        *(out.data_ptr(), x.data_ptr(), gain.data_ptr(), *x.shape, x.element_size(), torch.get_num_threads())
    )
    return True


def backward(
    grad: Tensor, x: Tensor, gain: Tensor, need_x: bool, need_gain: bool
) -> tuple[Tensor, Tensor] | None:
    """As the operator; None where the compiled code cannot run."""
    loaded = _library() if _fits(gain, grad, x) else None
    if loaded is None or not (need_x or need_gain):
        return None
    rows, columns = grad.shape
    of_x = grad.new_empty(grad.shape if need_x else 0)
    sums = gain.new_empty(-(-rows // BLOCK), columns) if need_gain else None
    loaded.graft_gain_backward(
        *(of_x.data_ptr() if need_x else None, None if sums is None else sums.data_ptr()),
        *(grad.data_ptr(), x.data_ptr(), gain.data_ptr(), rows, columns),
        *(grad.element_size(), torch.get_num_threads()),
    )
    return of_x, gain.new_empty(0) if sums is None else sums.sum(0)


def _fits(gain: Tensor, *matrices: Tensor) -> bool:
    first = matrices[0]
    return (
        first.dtype in (torch.bfloat16, torch.float32)
        and gain.dtype == torch.float32
        and gain.is_contiguous()
        and all(matrix.dtype == first.dtype and matrix.is_contiguous() for matrix in matrices)
    )


@cache
def _library() -> ctypes.CDLL | None:
    return opened(SOURCE, _load, "Gains are applied by plain torch, in several passes.")


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.graft_gain.argtypes = (*[pointer] * 4, size, size, number, number)
    loaded.graft_gain_on_rows.argtypes = (*[pointer] * 3, size, size, number, number)
    loaded.graft_gain_backward.argtypes = (*[pointer] * 5, size, size, number, number)
    loaded.graft_gain.restype = loaded.graft_gain_on_rows.restype = loaded.graft_gain_backward.restype = None
    return loaded
