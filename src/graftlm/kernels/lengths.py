"""Lengths of the rows of a weight with a low-rank change, which is never formed.

|W + s B A|^2 = |W|^2 + 2 s B . (W A^T) + s^2 B (A A^T) . B        |.| and . per row

The first two products are those of `ops.row_products`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftlm.kernels import lengths_cpu
from graftlm.kernels.ops import LIBRARY

LIBRARY.define("changed_lengths(Tensor squares, Tensor products, Tensor a, Tensor b, float scale) -> Tensor")


def _changed_lengths(squares: Tensor, products: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    a, b = a.to(products.dtype), b.to(products.dtype)
    crossed = products * (2 * scale) + _product(b, _product(a, a.t())) * scale**2
    return (squares + (b * crossed).sum(1)).clamp_min(0.0).sqrt()


def _changed_lengths_compiled(
    squares: Tensor, products: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    found = lengths_cpu.lengths(squares, products, a, b, scale)
    return _changed_lengths(squares, products, a, b, scale) if found is None else found


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In the dtype of a, also under autocast."""
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


LIBRARY.impl("changed_lengths", _changed_lengths, "CompositeExplicitAutograd")
LIBRARY.impl("changed_lengths", _changed_lengths_compiled, "CPU")


@torch.library.register_fake("graft::changed_lengths", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _changed_lengths_shape(squares: Tensor, products: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(squares)


def changed_lengths(squares: Tensor, products: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Lengths of the rows of `W + scale * B A`, a constant for autograd.

    Shapes: squares [N] and products [N, r] as `row_products` gives them, a [r, K], b [N, r] -> [N].
    """
    result: Tensor = torch.ops.graft.changed_lengths(
        squares.detach(), products.detach(), a.detach(), b.detach(), scale
    )
    return result
