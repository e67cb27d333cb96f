"""Products with packed weights on CUDA: read into one reused buffer by Triton, multiplied by cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.core.notices import notice
from graftlm.kernels import decoding
from graftlm.kernels.buffers import borrowed_on_stream

Read = Callable[[Tensor, Sequence[Tensor], str, int], None]


@cache
def _reader() -> Read | None:
    """Triton's, or None (and a notice) where it is not installed."""
    try:
        from graftlm.kernels.triton.dequantise import read_into
    except ImportError:
        notice(
            "Packed weights are read by plain torch, in several passes: triton is not installed. "
            "pip install 'graftlm[gpu]'"
        )
        return None
    return read_into


def decode(
    stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """`decoding.decode` in one pass."""
    read = _reader()
    if read is None or not _is_plain(stored):
        return decoding.decode(stored, kind, block, rows, columns, dtype)
    out = stored[0].new_empty((rows, columns), dtype=dtype)
    read(out, stored, kind, block)
    return out


def quantised_linear(
    x: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    block: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
) -> Tensor:
    """`decoding.quantised_linear` with the dense weight in a reused buffer."""
    read = _reader()
    if read is None or not _is_plain(stored):
        return decoding.quantised_linear(x, stored, kind, block, rows, columns, bias)
    with borrowed_on_stream(rows * columns, x.dtype, x.device) as buffer:
        weight = buffer.view(rows, columns)
        read(weight, stored, kind, block)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def quantised_linear_backward(
    grad: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int
) -> Tensor:
    """`decoding.quantised_linear_backward` with the dense weight in a reused buffer."""
    read = _reader()
    if read is None or not _is_plain(stored):
        return decoding.quantised_linear_backward(grad, stored, kind, block, rows, columns)
    with borrowed_on_stream(rows * columns, grad.dtype, grad.device) as buffer:
        weight = buffer.view(rows, columns)
        read(weight, stored, kind, block)
        return grad @ weight


def _is_plain(stored: Sequence[Tensor]) -> bool:
    return all(tensor.is_contiguous() for tensor in stored)
