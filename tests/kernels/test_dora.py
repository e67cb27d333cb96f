"""`dora_add` and `row_products` against their definitions in float64: values, gradients, schema, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.ops import dora_add, row_products

from .test_low_rank import DTYPES, SEED, TOLERANCE, draw, relative

NAMES = ("y", "x", "a", "b", "gain")


@st.composite
def problems(draw_from: st.DrawFn) -> tuple[tuple[int, ...], int, int, int, torch.dtype, bool]:
    leading = tuple(draw_from(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    width, out, rank = (draw_from(st.integers(1, high)) for high in (33, 29, 9))
    return leading, width, out, rank, draw_from(st.sampled_from(DTYPES)), draw_from(st.booleans())


def definition(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, gain: Tensor, bias: Tensor, keep: Tensor
) -> Tensor:
    return gain * (y - bias + 0.5 * (x * keep) @ a.T @ b.T) + bias


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.3]))
def test_values_and_gradients_are_those_of_the_definition(
    problem: tuple[tuple[int, ...], int, int, int, torch.dtype, bool], p: float
) -> None:
    leading, width, out, rank, dtype, has_bias = problem
    precise = torch.promote_types(dtype, torch.float32)
    x, y = draw(*leading, width, dtype=dtype, seed=1), draw(*leading, out, dtype=dtype, seed=2)
    a, b = draw(rank, width, dtype=precise, seed=3), draw(out, rank, dtype=precise, seed=4)
    gain = draw(out, dtype=precise, seed=5).abs() + 0.5
    bias = draw(out, dtype=dtype, seed=6) if has_bias else None
    ours = [t.clone().requires_grad_() for t in (y, x, a, b, gain)]
    exact = [t.double().requires_grad_() for t in (y, x, a, b, gain)]
    positive = [t.detach().double().abs().requires_grad_() for t in exact]

    torch.manual_seed(7)
    result = dora_add(*ours, bias, scale=0.5, dropout=p)
    torch.manual_seed(7)
    seed = torch.randint(2**62, ()) if p else SEED
    mask = reference.keep_mask(x.reshape(-1, width).shape, p, seed, x.device).view(x.shape).double()
    wide = torch.zeros(out, dtype=torch.float64) if bias is None else bias.double()
    value = definition(*exact, wide, mask / (1 - p))
    size = definition(*positive, -wide.abs(), mask / (1 - p)) + 2 * wide.abs()
    assert result.dtype == dtype and result.shape == y.shape
    assert relative(result, value, size) < TOLERANCE[dtype]
    weight = draw(*leading, out, dtype=dtype, seed=8)
    result.backward(weight)
    value.backward(weight.double())
    size.backward(weight.double().abs())
    for name, mine, true, bound in zip(NAMES, ours, exact, positive, strict=True):
        assert mine.grad is not None and true.grad is not None and bound.grad is not None
        assert mine.grad.dtype == mine.dtype
        assert relative(mine.grad, true.grad, bound.grad) < 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradcheck(p: float, has_bias: bool) -> None:
    shapes = ((3, 2, 5), (3, 2, 4), (2, 4), (5, 2), (5,))
    leaves = [draw(*shape, dtype=torch.float64, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    bias = draw(5, dtype=torch.float64, seed=9) if has_bias else None

    def same_mask(*args: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dora_add(*args, bias, scale=0.7, dropout=p)

    assert torch.autograd.gradcheck(same_mask, leaves)


def test_a_gain_of_one_leaves_the_output_to_the_bit() -> None:
    y, x = draw(6, 5, dtype=torch.bfloat16), draw(6, 4, dtype=torch.bfloat16)
    for bias in (None, draw(5, dtype=torch.bfloat16)):
        assert torch.equal(dora_add(y, x, draw(2, 4), torch.zeros(5, 2), torch.ones(5), bias, scale=1.0), y)


def test_a_gain_near_one_is_not_rounded_away_in_bfloat16() -> None:
    """The gain 1.01 is 1.0078 in bfloat16; over many outputs that are rounded, the mean must be right."""
    y = draw(20_000, 1, dtype=torch.bfloat16)
    x, a, b = torch.zeros(20_000, 1, dtype=torch.bfloat16), torch.zeros(1, 1), torch.zeros(1, 1)
    changed = dora_add(y, x, a, b, torch.tensor([1.01]), None, scale=1.0).double() - y.double()
    slope = (changed * y.double()).sum() / y.double().square().sum()
    assert abs(slope.item() - 0.01) < 5e-4


def test_a_gain_of_zero_gets_a_gradient_of_zero() -> None:
    gain = torch.tensor([0.0, 2.0], requires_grad=True)
    out = dora_add(
        torch.ones(3, 2), torch.ones(3, 1), torch.ones(1, 1), torch.ones(2, 1), gain, None, scale=1
    )
    out.sum().backward()
    torch.testing.assert_close(gain.grad, torch.tensor([0.0, 6.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_operators_pass_opcheck(dtype: torch.dtype, has_bias: bool) -> None:
    x, y, a, b = draw(6, 8, dtype=dtype), draw(6, 5, dtype=dtype), draw(2, 8), draw(5, 2)
    gain, bias = draw(5).abs() + 0.5, draw(5, dtype=dtype) if has_bias else None
    for p in (0.0, 0.25):
        torch.library.opcheck(torch.ops.graft.dora_add, (y, x, a, b, gain, bias, 0.5, p, SEED))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.graft.dora_backward, (y, y, gain, bias, *needs))
    for weight in (draw(5, 8, dtype=dtype), draw(8, 5, dtype=dtype).T):
        for need_squares in (True, False):
            torch.library.opcheck(torch.ops.graft.row_products, (weight, a, need_squares))


def test_strided_inputs_pass_opcheck_and_give_the_same_values() -> None:
    y, x, a, b = draw(5, 6).T, draw(8, 6).T, draw(8, 2).T, draw(2, 5).T
    gain = draw(5).abs() + 0.5
    torch.library.opcheck(torch.ops.graft.dora_add, (y, x, a, b, gain, None, 0.5, 0.0, SEED))
    torch.library.opcheck(torch.ops.graft.dora_backward, (y, y, gain, None, True, True))
    strided = dora_add(y, x, a, b, gain, None, scale=0.5)
    torch.testing.assert_close(
        strided, dora_add(*(t.contiguous() for t in (y, x, a, b)), gain, None, scale=0.5)
    )


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


def test_the_input_the_output_and_small_things_are_kept_for_backward() -> None:
    x, y = draw(64, 256, dtype=torch.bfloat16), draw(64, 128, dtype=torch.bfloat16).requires_grad_()
    a, b, gain = draw(4, 256).requires_grad_(), draw(128, 4).requires_grad_(), torch.ones(128)
    for is_trained in (True, False):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = dora_add(y, x, a, b, gain.clone().requires_grad_(is_trained), None, scale=1.0)
        small = (a.numel() + b.numel() + gain.numel()) * 4 + 64 * 4 * 2 + 8
        assert x.untyped_storage().data_ptr() in kept
        assert (out.untyped_storage().data_ptr() in kept) == is_trained
        assert sum(kept.values()) <= x.nbytes + is_trained * out.nbytes + small


def test_an_output_that_was_changed_in_place_is_an_error_and_no_wrong_gradient() -> None:
    leaves = [draw(*shape).requires_grad_() for shape in ((3, 5), (3, 4), (2, 4), (5, 2), (5,))]
    out = dora_add(*leaves, None, scale=1.0)
    with torch.no_grad():
        out.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_refused_instead_of_being_zero() -> None:
    leaves = [draw(*shape).requires_grad_() for shape in ((2, 3), (2, 4), (1, 4), (3, 1), (3,))]
    out = dora_add(*leaves, None, scale=1.0)
    (first,) = torch.autograd.grad(out.sin().sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
