"""The compiled products of low-rank factors, called with tensors. `thin` defines them."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graftlm.kernels.buffers import borrowed
from graftlm.kernels.native.opening import opened

SOURCE = Path(__file__).parent / "native" / "thin.c"
HIGHEST = 96
"""Rank that the compiled code takes. Plain torch does as well from there on."""


class _Matrix(ctypes.Structure):
    """The struct of the same name in thin.c."""

    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("rows", "columns", "row")))


def add(y: Tensor, s: Tensor, b: Tensor, scale: float) -> bool:
    """`y += scale * s b^T`; False, and nothing done, where the compiled code cannot run."""
    return _add(y, s, b, scale, None, None)


def add_with_gain(y: Tensor, s: Tensor, b: Tensor, scale: float, gain: Tensor, bias: Tensor | None) -> bool:
    """`y = gain * (y + scale * s b^T - bias) + bias`; False, and nothing done, where it cannot run."""
    if gain.dtype != torch.float32 or gain.shape != y.shape[1:]:
        return False
    offset = torch.zeros_like(gain) if bias is None else bias.float() * (1.0 - gain)
    return _add(y, s, b, scale, gain.contiguous(), offset.contiguous())


def _add(y: Tensor, s: Tensor, b: Tensor, scale: float, gain: Tensor | None, offset: Tensor | None) -> bool:
    fits = y.shape == (*s.shape[:1], *b.shape[:1]) and s.shape[1:] == b.shape[1:]
    loaded = _library() if fits and _fits(s.shape[-1], y, s, b) else None
    if loaded is None:
        return False
    memory = borrowed(512 * _groups(s.shape[1]) * _groups(y.shape[1]), torch.float32)
    loaded.graft_add_low_rank(
        *(_matrix(y), _matrix(s), _matrix(b), scale, _place(gain), _place(offset)),
        *(memory.data_ptr(), torch.get_num_threads()),
    )
    return True


def gradient(s: Tensor, grad: Tensor, scale: float) -> Tensor | None:
    """`scale * s^T grad` in float32; None where the compiled code cannot run."""
    return _gradient(s, grad, scale, s.new_empty(s.shape[-1], grad.shape[-1], dtype=torch.float32))


def gradient_turned(s: Tensor, grad: Tensor, scale: float) -> Tensor | None:
    """`scale * grad^T s` in float32; None where the compiled code cannot run."""
    out = s.new_empty(grad.shape[-1], s.shape[-1], dtype=torch.float32)
    return _gradient(s, grad, scale, out, is_turned=True)


def gradient_and_sums(s: Tensor, grad: Tensor, other: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """`scale * grad^T s`, and the sums over rows of `grad * other`, in float32; None where it cannot run."""
    out = s.new_empty(grad.shape[-1], s.shape[-1], dtype=torch.float32)
    sums = out.new_empty(grad.shape[-1])
    if grad.shape != other.shape or not _fits(s.shape[-1], other):
        return None
    found = _gradient(s, grad, scale, out, is_turned=True, other=other, sums=sums)
    return None if found is None else (found, sums)


def _gradient(
    s: Tensor,
    grad: Tensor,
    scale: float,
    out: Tensor,
    *,
    is_turned: bool = False,
    other: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor | None:
    loaded = _library() if s.shape[:1] == grad.shape[:1] and _fits(s.shape[-1], s, grad) else None
    if loaded is None:
        return None
    groups, deep = (_groups(s.shape[0]), _groups(grad.shape[1])), _groups(s.shape[1])
    memory = borrowed(512 * deep * (groups[0] + 2 * groups[1]) + 32 * groups[1], torch.float32)
    loaded.graft_thin_gradient(
        *(_matrix(s), _matrix(grad), None if other is None else _matrix(other), scale),
        *(out.data_ptr(), is_turned, _place(sums), memory.data_ptr(), torch.get_num_threads()),
    )
    return out


def _fits(rank: int, *matrices: Tensor) -> bool:
    return rank <= HIGHEST and all(
        matrix.dtype == torch.bfloat16
        and matrix.ndim == 2
        and matrix.numel() > 0
        and (matrix.stride(1) == 1 or matrix.shape[1] == 1)
        for matrix in matrices
    )


def _groups(values: int) -> int:
    """The compiled code takes 32 at a time."""
    return -(-values // 32)


def _matrix(x: Tensor) -> _Matrix:
    return _Matrix(x.data_ptr(), *x.shape, x.stride(0))


def _place(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@cache
def _library() -> ctypes.CDLL | None:
    loaded = opened(SOURCE, _load, "Products of low-rank factors are computed by plain torch, more slowly.")
    return loaded if loaded is not None and loaded.graft_thin_state() else None


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    if hasattr(loaded, "graft_thin_gradient"):
        matrix, pointer, number = ctypes.POINTER(_Matrix), ctypes.c_void_p, ctypes.c_int
        scale = ctypes.c_float
        loaded.graft_add_low_rank.argtypes = (*[matrix] * 3, scale, *[pointer] * 3, number)
        rest = (pointer, number, pointer, pointer, number)
        loaded.graft_thin_gradient.argtypes = (*[matrix] * 3, scale, *rest)
        loaded.graft_add_low_rank.restype = loaded.graft_thin_gradient.restype = None
    return loaded
