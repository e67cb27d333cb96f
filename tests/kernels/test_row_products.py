"""`row_products` against its definition in float64: values and schema."""

from __future__ import annotations

import pytest
import torch

from graftlm.kernels.ops import row_products

from .drawn import DTYPES, TOLERANCE, draw, relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_passes_opcheck(dtype: torch.dtype) -> None:
    a = draw(2, 8)
    for weight in (draw(5, 8, dtype=dtype), draw(8, 5, dtype=dtype).T):
        for need_squares in (True, False):
            torch.library.opcheck(torch.ops.graft.row_products, (weight, a, need_squares))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (300, 1000), (1000, 300)])
def test_row_products_are_squares_and_products(
    dtype: torch.dtype, is_transposed: bool, shape: tuple[int, int]
) -> None:
    """In pieces: two shapes are larger than one piece. Squares are exact to float32 for 16 bits too."""
    weight, a = draw(*shape, dtype=dtype), draw(3, shape[1])
    given_ = weight.T.contiguous().T if is_transposed else weight
    squares, products = row_products(given_, a)
    exact = weight.double()
    precise = torch.promote_types(dtype, torch.float32)
    assert squares.dtype == products.dtype == precise
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(squares.double(), exact.square().sum(1), rtol=tolerance, atol=0)
    assert relative(products, exact @ a.double().T, exact.abs() @ a.double().abs().T) < TOLERANCE[dtype]
    assert row_products(given_, a, need_squares=False)[0].numel() == 0
