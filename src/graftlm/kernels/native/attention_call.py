"""The compiled attention, called with tensors. `attention_reference` is its definition."""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from graftlm.core.compiling import state
from graftlm.kernels.buffers import borrowed
from graftlm.kernels.native.opening import opened

SOURCE = Path(__file__).with_name("attention.c")
WIDEST = 256
"""Values of a head that the compiled code takes."""

GROUP = 32
"""Queries that the compiled code takes at a time."""

_LONGEST = 2**30
"""Tokens; positions are 32-bit numbers there."""

_PIECES_PER_THREAD = 4
Piece = tuple[int, int, int, int, int]
"""First and last token of a document, first and last query of it, number of the document."""


class _Heads(ctypes.Structure):
    """The struct of the same name in attention.c."""

    _fields_ = (("at", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class _Attention(ctypes.Structure):
    """The struct of the same name in attention.c."""

    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "partial")),
        *((name, ctypes.c_int64) for name in ("tokens", "shared", "documents", "heads", "grouped")),
        *((name, ctypes.c_int64) for name in ("width", "window")),
        ("scale", ctypes.c_float),
    )


@cache
def library() -> ctypes.CDLL | str:
    """The compiled code, or why there is none (with a notice too, if it cannot be compiled)."""
    loaded = opened(SOURCE, load, "Attention is computed by plain torch, at a fraction of the speed.")
    if loaded is None:
        could, why = state()
        return "its source does not compile here" if could else why
    return loaded if loaded.graft_attention_state() else "the processor lacks AVX-512"


def load(path: Path) -> ctypes.CDLL:
    """A library compiled from `SOURCE`, its functions declared as far as the processor has them."""
    loaded = ctypes.CDLL(str(path))
    if loaded.graft_attention_state():
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        loaded.graft_attention.argtypes = (pointer, pointer, size, number, pointer, size, number)
        loaded.graft_attention.restype = None
        loaded.graft_attention_space.argtypes = (size, size, size, number)
        loaded.graft_attention_space.restype = size
    return loaded


def forward(
    compiled: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: list[int],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """`attention_reference.attention`, for bfloat16 on a CPU."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    pieces = _pieces(starts, _PIECES_PER_THREAD * torch.get_num_threads(), k.shape[1])
    problem = _problem(q, k, v, out, lse, starts, scale, window)
    _run(compiled, problem, pieces, backward=False)
    return out, lse


def backward(
    compiled: ctypes.CDLL,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: list[int],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_reference.attention_backward`, for bfloat16 on a CPU."""
    made = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    problem = _problem(q, k, v, out, lse, starts, scale, window)
    problem.grad = _heads(grad)
    problem.dq, problem.dk, problem.dv = (_heads(x) for x in made)
    partial = lse.new_empty(2 * problem.documents * problem.shared * problem.heads * problem.width)
    problem.partial = partial.data_ptr()
    _run(compiled, problem, _pieces(starts, 1, k.shape[1]), backward=True)
    return made


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: list[int],
    scale: float,
    window: int | None,
) -> _Attention:
    tokens, heads, width = q.shape
    problem = _Attention()
    problem.q, problem.k, problem.v, problem.out = (_heads(x) for x in (q, k, v, out))
    problem.lse = lse.data_ptr()
    problem.tokens, problem.shared, problem.documents = tokens, len(k) - tokens, len(starts) - 1
    problem.heads, problem.grouped, problem.width = k.shape[1], heads // k.shape[1], width
    problem.window, problem.scale = min(window or _LONGEST, _LONGEST), scale
    return problem


def _heads(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), x.stride(0), x.stride(1))


def _pieces(starts: list[int], wanted: int, heads: int) -> list[Piece]:
    """Documents, cut until there is work for all; the longest first. Results do not depend on it."""
    documents = [(*span, n) for n, span in enumerate(pairwise(starts)) if span[0] < span[1]]
    step = _LONGEST
    if len(documents) * heads < wanted:
        share = starts[-1] * heads // wanted
        step = max(8 * GROUP, -(-share // GROUP) * GROUP)
    pieces = [
        (first, last, start, min(start + step, last - first), number)
        for first, last, number in documents
        for start in range(0, last - first, step)
    ]
    return sorted(pieces, key=lambda piece: piece[3] ** 2 - piece[2] ** 2, reverse=True)


def _run(compiled: ctypes.CDLL, problem: _Attention, pieces: list[Piece], *, backward: bool) -> None:
    if not pieces:
        return
    threads = min(torch.get_num_threads(), len(pieces) * problem.heads)
    longest = max(last - first for first, last, *_ in pieces)
    space = compiled.graft_attention_space(longest, problem.shared, problem.width, backward)
    memory = borrowed(threads * space // 4, torch.float32)
    table = (ctypes.c_int64 * (5 * len(pieces)))(*(value for piece in pieces for value in piece))
    compiled.graft_attention(
        *(ctypes.byref(problem), table, len(pieces), backward, memory.data_ptr(), space, threads)
    )
