"""The compiled elementwise layers, called with tensors. `pointwise_reference` is their definition.

Every function takes rows with any stride and a contiguous last dimension, and writes contiguous ones.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graftlm.kernels.native.opening import opened

SOURCE = Path(__file__).with_name("pointwise.c")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
GATES = ("gated_silu", "gated_gelu")
LARGEST_HEAD = 512
"""Values of a head that can turn."""
_SHARE = 2**15
"""Values that make a thread worth waking."""

Gate = Literal["silu", "gelu"]
"""The function of the gate; GELU in its form with tanh."""


class _Heads(ctypes.Structure):
    """The struct of the same name in pointwise.c."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch_stride", "head_stride", "token_stride", "heads")),
        ("out", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where there cannot be any."""
    return opened(SOURCE, load, "Norms, gates, rotations and losses run in plain torch, in several passes.")


def load(path: Path) -> ctypes.CDLL:
    """A library compiled from `SOURCE`, its functions declared."""
    loaded = ctypes.CDLL(str(path))
    pointer, number, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    row, sizes, last = (pointer, size), (size, size), (number, number)
    declared = {
        "rms_norm": (*row, pointer, number, *sizes, real, pointer, pointer, *last),
        "rms_norm_backward": (*row, *row, pointer, number, pointer, *sizes, pointer, *last),
        **dict.fromkeys(GATES, (*row, *row, *sizes, pointer, *last)),
        **{f"{gate}_backward": (*row, *row, *row, *sizes, pointer, pointer, *last) for gate in GATES},
        "rope": (*(pointer,) * 3, *(size,) * 5, number, number, *last),
        "softmax_piece": (pointer, *sizes, pointer, size, *(pointer,) * 4, *last),
        "shrink_and_add": (pointer, pointer, pointer, *sizes, *last),
    }
    for name, types in declared.items():
        function = getattr(loaded, f"graft_{name}")
        function.argtypes, function.restype = types, None
    return loaded


def is_native(*tensors: Tensor) -> bool:
    """Whether the compiled code runs for such tensors."""
    fits = all(tensor.is_cpu and tensor.dtype in TYPES for tensor in tensors)
    return fits and library() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, scale: Tensor) -> None:
    """Shapes: x, out [T, K], weight [K], contiguous, of any type; scale [T, 1], float32."""
    _compiled().graft_rms_norm(
        *_rows(x), weight.data_ptr(), TYPES[weight.dtype], *x.shape, eps, out.data_ptr(), scale.data_ptr(),
        *_how(x),
    )  # fmt: skip


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, out: Tensor) -> None:
    """Shapes: grad, x, out [T, K], weight [K], scale [T, 1]."""
    _compiled().graft_rms_norm_backward(
        *_rows(grad), *_rows(x), weight.data_ptr(), TYPES[weight.dtype], scale.data_ptr(), *x.shape,
        out.data_ptr(), *_how(x),
    )  # fmt: skip


def gated(kind: Gate, gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Shapes: [T, K] each."""
    form = getattr(_compiled(), f"graft_gated_{kind}")
    form(*_rows(gate), *_rows(up), *gate.shape, out.data_ptr(), *_how(gate))


def gated_backward(
    kind: Gate, grad: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor
) -> None:
    """Shapes: [T, K] each."""
    form = getattr(_compiled(), f"graft_gated_{kind}_backward")
    pointers = (of_gate.data_ptr(), of_up.data_ptr())
    form(*_rows(grad), *_rows(gate), *_rows(up), *gate.shape, *pointers, *_how(gate))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, of_q: Tensor, of_k: Tensor) -> None:
    """Shapes: q [B, Hq, T, D], k [B, Hk, T, D], cos, sin [B or 1, T, R], contiguous; of_q, of_k like q and k,
    transposed views of contiguous [B, T, H, D]."""
    batches, _, tokens, width = q.shape
    angles = cos.shape[1] * cos.shape[2] if len(cos) > 1 else 0
    _compiled().graft_rope(
        (_Heads * 2)(_heads(q, of_q), _heads(k, of_k)), cos.data_ptr(), sin.data_ptr(), angles,
        batches, tokens, cos.shape[-1] // 2, width, TYPES[cos.dtype], int(inverse), *_how(q),
    )  # fmt: skip


def softmax_piece(
    logits: Tensor, labels: Tensor, first: int, largest: Tensor, others: Tensor, of_label: Tensor
) -> Tensor:
    """The logits [T, n] of columns `first` and on become exponentials, with a zero at the label; returns what
    earlier ones shrink by [T]. `largest`, `others` and `of_label` [T], float32, are carried on."""
    shrink = torch.empty_like(largest)
    pointers = (tensor.data_ptr() for tensor in (largest, others, of_label, shrink))
    _compiled().graft_softmax_piece(
        logits.data_ptr(), *logits.shape, labels.data_ptr(), first, *pointers, *_how(logits)
    )
    return shrink


def shrink_and_add(gathered: Tensor, shrink: Tensor, part: Tensor) -> None:
    """`gathered = gathered * shrink + part`. Shapes: gathered [T, K], float32, shrink [T], part [T, K]."""
    _compiled().graft_shrink_and_add(
        gathered.data_ptr(), shrink.data_ptr(), part.data_ptr(), *part.shape, *_how(part)
    )


def _compiled() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "is_native was not asked"
    return loaded


def _rows(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


def _how(like: Tensor) -> tuple[int, int]:
    """Type, and threads: as many as the work is worth. The values do not depend on them."""
    return TYPES[like.dtype], max(1, min(torch.get_num_threads(), like.numel() // _SHARE))


def _heads(x: Tensor, out: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), *x.stride()[:3], x.shape[1], out.data_ptr())
