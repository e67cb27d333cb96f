"""Plain torch definitions of every operator: the oracle, and what runs where nothing faster is registered.

Legend of shapes: T tokens (all leading dimensions), K input width, N output width, r rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def row_products(weight: Tensor, a: Tensor, need_squares: bool) -> tuple[Tensor, Tensor]:
    """Squared norms of the rows of `weight` (empty unless `need_squares`), and `weight A^T`.

    Shapes: weight [N, K] of any layout, a [r, K] -> [N], [N, r], in float32 or better. The product is
    computed in the weight's dtype, as the layer's own is; `out` keeps autocast from choosing another.
    """
    precise = torch.promote_types(weight.dtype, torch.float32)
    products = weight.new_empty(weight.shape[0], a.shape[0])
    torch.mm(weight, a.to(weight.dtype).t(), out=products)
    squares = weight.new_zeros(weight.shape[0] if need_squares else 0, dtype=precise)
    is_transposed = weight.stride(0) < weight.stride(1)
    stored = weight.t() if is_transposed else weight
    for rows in pieces(stored) if need_squares else ():
        part = stored[rows].to(precise)
        if is_transposed:
            squares += part.square().sum(0)
        else:
            squares[rows] = torch.linalg.vecdot(part, part)
    return squares, products.to(precise)


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Rows that stay in a CPU's cache between two operations; on an accelerator, few large pieces."""
    elements = 2**17 if tensor.device.type == "cpu" else 2**24
    step = max(1, elements // max(1, tensor.shape[1]))
    step -= step % 32 if step > 32 else 0  # whole vectors, so that no piece ends in scalar code
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)
