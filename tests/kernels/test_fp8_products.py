"""Products where both sides are 8 bits, against their definition and float64."""

from __future__ import annotations

import pytest
import torch

from graftlm.kernels import fp8_products
from graftlm.kernels.encoding import encode_rows_fp8
from graftlm.kernels.fp8_products import FP8_PRODUCTS, multiply_as_defined, multiply_in_8_bits
from graftlm.kernels.quantised import quantised_linear

CPU = fp8_products.why_not(torch.device("cpu"))
SHAPES = [(1, 16, 16), (5, 32, 48), (33, 64, 128)]


def parts(tokens: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(tokens)
    x, grad, weight = (
        torch.randn(*shape, generator=generator)
        for shape in ((tokens, columns), (tokens, rows), (rows, columns))
    )
    scales = torch.logspace(-3, 3, rows).unsqueeze(1)  # rows of very different sizes
    return x, grad, list(encode_rows_fp8(weight * scales))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 7, 9)])
def test_the_definition_is_near_the_exact_product(shape: tuple[int, int, int]) -> None:
    x, grad, stored = parts(*shape)
    weight = stored[0].double() * stored[1].double().unsqueeze(1)
    y = fp8_products.linear(x, stored, None, multiply_as_defined)
    error = (y - x.double() @ weight.t()).norm(dim=0) / (x.double() @ weight.t()).norm(dim=0)
    assert error.median() < 0.05, "each output has its own scale"
    dx = fp8_products.linear_backward(grad, stored, multiply_as_defined)
    exact = grad.double() @ weight
    assert (dx - exact).norm() < 0.05 * exact.norm()


@pytest.mark.skipif(CPU is not None, reason=f"this torch does not multiply in FP8: {CPU}")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_library_multiplies_as_defined(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, grad, stored = parts(*shape)
    x, grad = x.to(dtype), (grad * 1e-3).to(dtype)
    bias = torch.randn(shape[1]).to(dtype)
    for mine, its in (
        [fp8_products.linear(x, stored, bias, way) for way in (multiply_in_8_bits, multiply_as_defined)],
        [fp8_products.linear_backward(grad, stored, w) for w in (multiply_in_8_bits, multiply_as_defined)],
    ):
        assert mine.dtype == dtype
        assert (mine.double() - its.double()).norm() <= 0.005 * its.double().norm()


@pytest.mark.skipif(CPU is not None, reason=f"this torch does not multiply in FP8: {CPU}")
def test_the_operators_know_the_kind() -> None:
    x, grad, stored = parts(5, 32, 48)
    x.requires_grad_()
    y = quantised_linear(x, stored, FP8_PRODUCTS, 64, 32, 48, None)
    y.backward(grad)
    assert torch.equal(y, fp8_products.linear(x.detach(), stored, None, multiply_in_8_bits))
    assert x.grad is not None
    assert torch.equal(x.grad, fp8_products.linear_backward(grad, stored, multiply_in_8_bits))
    out = torch.ones(5, 48)
    torch.ops.graft.quantised_linear_accumulate(out, grad, stored, FP8_PRODUCTS, 64, 32, 48)
    torch.testing.assert_close(out, 1 + x.grad)


def test_rows_of_zeros_stay_zeros() -> None:
    stored = list(encode_rows_fp8(torch.randn(16, 16)))
    y = fp8_products.linear(torch.zeros(2, 16), stored, None, multiply_as_defined)
    assert torch.equal(y, torch.zeros(2, 16))
