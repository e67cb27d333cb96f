"""Products with packed weights on a CPU, a piece at a time.

A piece is read into one small buffer and multiplied at once, so that no dense weight ever exists. Forward
takes rows of W, the gradient columns: either way each value of the result is one whole dot product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graftlm.kernels import decoding
from graftlm.kernels.buffers import borrowed
from graftlm.kernels.native.call import Reader, reader

PIECE = 2**21
"""Values of the weight that are dense at a time: 4 MiB of 16 bits."""

NARROWEST = 256
"""Rows or columns that a piece has at least: matrix units starve on narrower ones."""

FEW = 2
"""Up to so many rows of x, reading and multiplying in one pass beats a piece and a matrix product."""


def decode(
    stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """`decoding.decode`, compiled."""
    weight = reader(stored, kind, block, rows, columns, dtype)
    if weight is None:
        return decoding.decode(stored, kind, block, rows, columns, dtype)
    out = stored[0].new_empty((rows, columns), dtype=dtype)
    weight.read(out, range(rows), range(columns))
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
    """`decoding.quantised_linear`, a piece at a time."""
    weight = reader(stored, kind, block, rows, columns, x.dtype)
    if weight is None:
        return decoding.quantised_linear(x, stored, kind, block, rows, columns, bias)
    if len(x) <= FEW:
        out = weight.multiply(x)
        return (out if bias is None else out.add_(bias)).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    out = x.new_empty(len(x), rows)
    for part in _pieces(rows, columns):
        dense = borrowed(len(part) * columns, x.dtype).view(len(part), columns)
        weight.read(dense, part, range(columns))
        place = out[:, part.start : part.stop]
        if bias is None:
            torch.mm(x, dense.t(), out=place)
        else:
            torch.addmm(bias[part.start : part.stop], x, dense.t(), out=place)
    return out


def quantised_linear_backward(
    grad: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int
) -> Tensor:
    """`decoding.quantised_linear_backward`, a piece at a time."""
    weight = reader(stored, kind, block, rows, columns, grad.dtype)
    if weight is None:
        return decoding.quantised_linear_backward(grad, stored, kind, block, rows, columns)
    out = grad.new_empty(len(grad), columns)
    for part, dense in _columns(weight, grad.dtype):
        torch.mm(grad, dense, out=out[:, part])
    return out


def quantised_linear_accumulate(
    out: Tensor, grad: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int
) -> None:
    """`out += grad W`, a piece at a time."""
    weight = reader(stored, kind, block, rows, columns, grad.dtype)
    if weight is None:
        out += decoding.quantised_linear_backward(grad, stored, kind, block, rows, columns)
        return
    for part, dense in _columns(weight, grad.dtype):
        out[:, part].addmm_(grad, dense)


def _columns(weight: Reader, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the weight, read into one buffer again and again."""
    for part in _pieces(weight.columns, weight.rows):
        dense = borrowed(weight.rows * len(part), dtype).view(weight.rows, len(part))
        weight.read(dense, range(weight.rows), part)
        yield slice(part.start, part.stop), dense


def _pieces(count: int, width: int) -> Iterator[range]:
    """`count` lines of `width` values, in pieces of equal size (the last may be short)."""
    step = max(NARROWEST, PIECE // width // NARROWEST * NARROWEST)
    for start in range(0, count, step):
        yield range(start, min(start + step, count))
