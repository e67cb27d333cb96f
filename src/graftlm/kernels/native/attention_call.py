"""The compiled attention, called with tensors. `attention_reference` is its definition."""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from graftlm.core.compiling import state
from graftlm.kernels.attention_reference import Document
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
Piece = tuple[int, int, int, int, int, int]
"""A document: its first and last token, first and last query of it, first and last token of its parent."""
Task = list[Piece]
"""What one thread computes: a piece, or a document and all that continue it."""


class _Heads(ctypes.Structure):
    """The struct of the same name in attention.c."""

    _fields_ = (("at", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class _Attention(ctypes.Structure):
    """The struct of the same name in attention.c."""

    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "partial")),
        *((name, ctypes.c_int64) for name in ("tokens", "shared", "tasks", "heads", "grouped")),
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
        loaded.graft_attention.argtypes = (pointer, pointer, pointer, number, pointer, size, number)
        loaded.graft_attention.restype = None
        loaded.graft_attention_space.argtypes = (size, size, size, size, number)
        loaded.graft_attention_space.restype = size
    return loaded


def forward(
    compiled: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: list[Document],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """`attention_reference.attention`, for bfloat16 on a CPU."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    pieces = _pieces(documents, _PIECES_PER_THREAD * torch.get_num_threads(), k.shape[1])
    problem = _problem(q, k, v, out, lse, len(pieces), scale, window)
    _run(compiled, problem, [[piece] for piece in pieces], backward=False)
    return out, lse


def backward(
    compiled: ctypes.CDLL,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: list[Document],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_reference.attention_backward`, for bfloat16 on a CPU."""
    made = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    families = _families(documents)
    problem = _problem(q, k, v, out, lse, len(families), scale, window)
    problem.grad = _heads(grad)
    problem.dq, problem.dk, problem.dv = (_heads(x) for x in made)
    partial = lse.new_empty(2 * problem.tasks * problem.shared * problem.heads * problem.width)
    problem.partial = partial.data_ptr()
    _run(compiled, problem, families, backward=True)
    return made


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tasks: int,
    scale: float,
    window: int | None,
) -> _Attention:
    tokens, heads, width = q.shape
    problem = _Attention()
    problem.q, problem.k, problem.v, problem.out = (_heads(x) for x in (q, k, v, out))
    problem.lse = lse.data_ptr()
    problem.tokens, problem.shared, problem.tasks = tokens, len(k) - tokens, tasks
    problem.heads, problem.grouped, problem.width = k.shape[1], heads // k.shape[1], width
    problem.window, problem.scale = min(window or _LONGEST, _LONGEST), scale
    return problem


def _heads(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), x.stride(0), x.stride(1))


def _pieces(documents: list[Document], wanted: int, heads: int) -> list[Piece]:
    """Documents, cut until there is work for all; the longest first. Results do not depend on it."""
    filled = [document for document in documents if document.first < document.last]
    step = _LONGEST
    if len(filled) * heads < wanted:
        share = sum(document.last - document.first for document in filled) * heads // wanted
        step = max(8 * GROUP, -(-share // GROUP) * GROUP)
    pieces = [
        (first, last, start, min(start + step, last - first), above_first, above_last)
        for first, last, above_first, above_last in filled
        for start in range(0, last - first, step)
    ]
    return sorted(pieces, key=_scores, reverse=True)


def _families(documents: list[Document]) -> list[Task]:
    """Each document with those that continue it behind it, as their gradients meet in its keys."""
    families: dict[int, Task] = {}
    for first, last, above_first, above_last in documents:
        if first < last:
            root = above_first if above_first < above_last else first
            families.setdefault(root, []).append((first, last, 0, last - first, above_first, above_last))
    return sorted(families.values(), key=lambda family: sum(map(_scores, family)), reverse=True)


def _scores(piece: Piece) -> int:
    """About twice as many scores as it has."""
    _, _, start, stop, above_first, above_last = piece
    return stop**2 - start**2 + 2 * (above_last - above_first) * (stop - start)


def _run(compiled: ctypes.CDLL, problem: _Attention, tasks: list[Task], *, backward: bool) -> None:
    if not tasks:
        return
    pieces = [piece for task in tasks for piece in task]
    threads = min(torch.get_num_threads(), len(tasks) * problem.heads)
    longest = max(last - first for first, last, *_ in pieces)
    above = max(above_last - above_first for *_, above_first, above_last in pieces)
    space = compiled.graft_attention_space(longest, problem.shared, above, problem.width, backward)
    memory = borrowed(threads * space // 4, torch.float32)
    table = (ctypes.c_int64 * (6 * len(pieces)))(*(value for piece in pieces for value in piece))
    ends = (ctypes.c_int64 * (len(tasks) + 1))(0, *accumulate(map(len, tasks)))
    compiled.graft_attention(
        *(ctypes.byref(problem), table, ends, backward, memory.data_ptr(), space, threads)
    )
