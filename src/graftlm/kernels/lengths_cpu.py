"""The compiled lengths of changed rows, called with tensors. `lengths` is their definition."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graftlm.kernels.native.opening import opened

SOURCE = Path(__file__).parent / "native" / "lengths.c"
LANES = 16
"""Ranks that the compiled code takes at a time."""


def lengths(squares: Tensor, products: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor | None:
    """As the operator; None where the compiled code cannot run."""
    loaded = _library() if _fits(squares, products, a, b) else None
    if loaded is None:
        return None
    rank = len(a)
    out, gram = torch.empty_like(squares), a.new_zeros(rank, -(-rank // LANES) * LANES)
    torch.mm(a, a.t(), out=gram[:, :rank])  # `out` keeps autocast from choosing another dtype
    loaded.graft_changed_lengths(
        *(out.data_ptr(), squares.data_ptr(), products.data_ptr(), b.data_ptr(), gram.data_ptr()),
        *(scale, *b.shape, gram.shape[1], torch.get_num_threads()),
    )
    return out


def _fits(squares: Tensor, products: Tensor, a: Tensor, b: Tensor) -> bool:
    return (
        squares.shape == b.shape[:1]
        and products.shape == b.shape
        and a.shape[:1] == b.shape[1:]
        and a.dtype == torch.float32
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in (squares, products, b))
    )


@cache
def _library() -> ctypes.CDLL | None:
    return opened(SOURCE, _load, "DoRA's lengths of rows are computed by plain torch, in several passes.")


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.graft_changed_lengths.argtypes = (*[pointer] * 5, ctypes.c_float, *[size] * 3, number)
    loaded.graft_changed_lengths.restype = None
    return loaded
