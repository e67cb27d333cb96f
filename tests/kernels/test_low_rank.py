"""`low_rank_add` against its definition in float64: values, gradients, dropout, schema, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.kernels import reference
from graftlm.kernels.ops import low_rank_add

SEED = torch.tensor(1234)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(ours: Tensor, exact: Tensor, size: Tensor) -> float:
    """Error over `size`, the same sum with every term positive: rounding acts on terms, which may cancel."""
    ours, exact, size = (tensor.detach().double() for tensor in (ours, exact, size))
    return float((ours - exact).norm() / size.norm().clamp_min(1e-30))


@st.composite
def problems(draw_from: st.DrawFn) -> tuple[tuple[int, ...], int, int, int, torch.dtype]:
    leading = tuple(draw_from(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    width, out, rank = (draw_from(st.integers(1, high)) for high in (33, 29, 9))
    return leading, width, out, rank, draw_from(st.sampled_from(DTYPES))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.3]))
def test_values_and_gradients_are_those_of_the_definition(
    problem: tuple[tuple[int, ...], int, int, int, torch.dtype], p: float
) -> None:
    leading, width, out, rank, dtype = problem
    x, y = draw(*leading, width, dtype=dtype, seed=1), draw(*leading, out, dtype=dtype, seed=2)
    a, b = draw(rank, width, seed=3), draw(out, rank, seed=4)
    if dtype == torch.float64:
        a, b = a.double(), b.double()
    given_, exact = ([t.clone().requires_grad_() for t in (y, x, a, b)] for _ in range(2))
    exact = [t.detach().double().requires_grad_() for t in exact]

    torch.manual_seed(7)
    result = low_rank_add(*given_, scale=0.5, dropout=p)
    torch.manual_seed(7)
    seed = torch.randint(2**62, ()) if p else SEED
    keep = reference.keep_mask(x.reshape(-1, width).shape, p, seed, x.device).view(x.shape) if p else 1.0

    def definition(y64: Tensor, x64: Tensor, a64: Tensor, b64: Tensor) -> Tensor:
        return y64 + 0.5 * ((x64 * keep / (1 - p)) @ a64.T) @ b64.T

    positive = [t.detach().abs().requires_grad_() for t in exact]
    value, size = definition(*exact), definition(*positive)
    assert result.dtype == dtype and result.shape == y.shape
    assert relative(result, value, size) < TOLERANCE[dtype]
    weight = draw(*leading, out, dtype=dtype, seed=5)
    result.backward(weight)
    value.backward(weight.double())
    size.backward(weight.double().abs())
    for name, ours, theirs, bound in zip("yxab", given_, exact, positive, strict=True):
        assert ours.grad is not None and theirs.grad is not None and bound.grad is not None
        assert ours.grad.dtype == ours.dtype
        assert relative(ours.grad, theirs.grad, bound.grad) < TOLERANCE[dtype], name


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p: float) -> None:
    tensors = [draw(3, 2, 5, dtype=torch.float64, seed=1), draw(3, 2, 4, dtype=torch.float64, seed=2)]
    tensors += [draw(2, 4, dtype=torch.float64, seed=3), draw(5, 2, dtype=torch.float64, seed=4)]

    def same_mask(*args: Tensor) -> Tensor:
        torch.manual_seed(3)
        return low_rank_add(*args, scale=0.7, dropout=p)

    assert torch.autograd.gradcheck(same_mask, [t.requires_grad_() for t in tensors])


def test_the_mask_is_a_function_of_the_seed_and_keeps_the_right_share() -> None:
    shape = torch.Size((500, 400))
    first, again, other = (
        reference.keep_mask(shape, 0.1, torch.tensor(seed), torch.device("cpu")) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for mask in (first, other):
        assert abs(mask.double().mean().item() - 0.9) < 5 * (0.09 / mask.numel()) ** 0.5
    agreement = (first == other).double().mean().item()
    assert abs(agreement - 0.82) < 5 * (0.82 * 0.18 / first.numel()) ** 0.5


def test_every_call_draws_another_mask_and_the_generator_decides() -> None:
    x, y = torch.ones(8, 64), torch.zeros(8, 3)
    a, b = torch.ones(1, 64), torch.ones(3, 1)
    torch.manual_seed(11)
    first, second = (low_rank_add(y, x, a, b, scale=1.0, dropout=0.5) for _ in range(2))
    torch.manual_seed(11)
    assert torch.equal(first, low_rank_add(y, x, a, b, scale=1.0, dropout=0.5))
    assert not torch.equal(first, second)


def test_without_dropout_the_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    low_rank_add(torch.zeros(2, 3), torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 1), scale=1.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3])
def test_dropout_keeps_the_expectation_in_bfloat16(p: float) -> None:
    """1 / (1 - p) rounded to bfloat16 would shift every output by up to 0.4 %."""
    x = torch.ones(256, 2048, dtype=torch.bfloat16)
    a, b = torch.full((1, 2048), 2.0**-11), torch.ones(1, 1)
    y = torch.zeros(256, 1, dtype=torch.bfloat16)
    torch.manual_seed(0)
    mean = torch.cat([low_rank_add(y, x, a, b, scale=1.0, dropout=p) for _ in range(8)]).double().mean()
    assert abs(mean.item() - 1.0) < 1.2e-3


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_opcheck(p: float, dtype: torch.dtype) -> None:
    x, y, a, b = draw(6, 8, dtype=dtype), draw(6, 5, dtype=dtype), draw(2, 8), draw(5, 2)
    s, grad = draw(6, 2, dtype=dtype), draw(6, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.graft.low_rank_add, (y, x, a, b, 0.5, p, SEED))
    for need_x in (True, False):
        torch.library.opcheck(torch.ops.graft.low_rank_backward, (grad, x, s, a, b, 0.5, p, SEED, need_x))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_strided_inputs_pass_opcheck_and_give_the_same_values(p: float) -> None:
    x, y = draw(8, 6).T, draw(5, 6).T
    a, b = draw(8, 2).T, draw(2, 5).T
    s, grad = draw(2, 6).T, draw(5, 6).T
    torch.library.opcheck(torch.ops.graft.low_rank_add, (y, x, a, b, 0.5, p, SEED))
    torch.library.opcheck(torch.ops.graft.low_rank_backward, (grad, x, s, a, b, 0.5, p, SEED, True))
    strided = torch.ops.graft.low_rank_add(y, x, a, b, 0.5, p, SEED)[0]
    dense = torch.ops.graft.low_rank_add(*(t.contiguous() for t in (y, x, a, b)), 0.5, p, SEED)[0]
    torch.testing.assert_close(strided, dense)


def test_strided_three_dimensional_inputs_have_the_gradients_of_the_definition() -> None:
    x, y = draw(4, 3, 6, dtype=torch.float64), draw(5, 3, 4, dtype=torch.float64)
    a, b = draw(2, 6, dtype=torch.float64), draw(5, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (y, x, a, b)]
    gradients = []
    for function in (
        lambda y, x, a, b: low_rank_add(y, x, a, b, scale=0.5),
        lambda y, x, a, b: y + 0.5 * (x @ a.T) @ b.T,
    ):
        out = function(y.permute(1, 2, 0), x.permute(1, 0, 2), a, b)
        gradients.append(torch.autograd.grad((out * out).sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_derivative_is_refused_instead_of_being_zero() -> None:
    leaves = [draw(2, 3), draw(2, 4), draw(1, 4), draw(3, 1)]
    out = low_rank_add(*(t.requires_grad_() for t in leaves), scale=1.0)
    (first,) = torch.autograd.grad(out.sin().sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_output_may_be_changed_in_place_as_that_of_a_linear_layer() -> None:
    """Some models clamp queries in place."""
    leaves = [draw(*shape).requires_grad_() for shape in ((2, 3, 5), (2, 3, 4), (2, 4), (5, 2))]
    gradients = []
    for is_in_place in (False, True):
        out = low_rank_add(*leaves, scale=1.0)
        out = out.clamp_(-0.5, 0.5) if is_in_place else out.clamp(-0.5, 0.5)
        gradients.append(torch.autograd.grad(out.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_only_the_input_and_the_rank_r_product_are_kept_for_backward(p: float) -> None:
    x, y = draw(64, 256, dtype=torch.bfloat16), draw(64, 128, dtype=torch.bfloat16)
    a, b = draw(4, 256).requires_grad_(), draw(128, 4).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low_rank_add(y, x, a, b, scale=1.0, dropout=p)
    parameters = (a.numel() + b.numel()) * 4
    assert x.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) - parameters <= x.nbytes + 64 * 4 * 2 + 8
