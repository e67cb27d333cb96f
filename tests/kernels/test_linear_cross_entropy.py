"""`linear_cross_entropy` against torch's own cross-entropy on all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from graftlm.core.errors import GraftError
from graftlm.kernels.native import pointwise_call as native
from graftlm.kernels.ops import linear_cross_entropy

from .drawn import TOLERANCE, draw, relative


def problem(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, *, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rows + width + vocabulary)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if with_bias else None
    return hidden, weight, labels, bias


def definition(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight.double(), None if bias is None else bias.double())
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.fixture(params=["compiled", "plain torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain torch":
        monkeypatch.setattr(native, "library", lambda: None)
    return str(request.param)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 23),
    width=st.integers(1, 17),
    vocabulary=st.integers(1, 37),
    chunk=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_bias=st.booleans(),
)
def check_loss_and_gradient(
    rows: int, width: int, vocabulary: int, chunk: int, dtype: torch.dtype, with_bias: bool
) -> None:
    hidden, weight, labels, bias = problem(rows, width, vocabulary, dtype, with_bias=with_bias)
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = linear_cross_entropy(ours, weight, labels, bias=bias, chunk_rows=chunk)
    expected = definition(exact, weight, labels, bias)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    assert loss.dtype == torch.float32
    assert ours.grad is not None and exact.grad is not None
    loose = dtype == torch.bfloat16
    tolerance = 3e-2 if loose else 2e-5
    assert abs(loss.item() - expected.item()) <= tolerance * max(1.0, expected.item())
    error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm().clamp_min(1e-2)
    assert error.item() < tolerance


@pytest.mark.usefixtures("way")
def test_loss_and_gradient_are_those_of_the_definition() -> None:
    check_loss_and_gradient()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("chunk", [1, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies_that_fill_several_blocks(dtype: torch.dtype, chunk: int) -> None:
    """With logits that no float32 exponential holds, the largest in the last piece."""
    hidden, weight, labels, bias = problem(37, 8, 1500, dtype, with_bias=True)
    weight = weight * torch.linspace(1, 9, 1500).unsqueeze(1).to(dtype)
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = linear_cross_entropy(ours, weight, labels, bias=bias, chunk_rows=chunk)
    expected = definition(exact, weight, labels, bias)
    (gradient,), (truth,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, exact)
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2  # logits near 100, rounded to 0.25
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    assert (gradient.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.usefixtures("way")
def test_a_value_that_is_not_finite_is_not_hidden() -> None:
    hidden, weight, labels, _ = problem(3, 8, 300, torch.float32, with_bias=False)
    for value in (torch.nan, torch.inf):
        broken = hidden.index_fill(0, torch.tensor(1), value)
        assert not torch.isfinite(linear_cross_entropy(broken, weight, labels))


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_the_size_of_chunks_changes_nothing(chunk: int) -> None:
    hidden, weight, labels, bias = problem(10, 6, 9, torch.float32, with_bias=True)
    whole = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_rows=10)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_rows=chunk), whole
    )


@pytest.mark.parametrize("rows", [255, 257, 320, 330])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_fill_a_matrix_up_count_for_nothing(rows: int, dtype: torch.dtype) -> None:
    hidden, weight, bias = draw(rows, 9, dtype=dtype), draw(40, 9, dtype=dtype, seed=1), draw(40, seed=2)
    labels = torch.arange(rows) % 40
    given = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(given, weight, labels, bias=bias.to(dtype))
    loss.backward()
    wide = hidden.double().requires_grad_()
    logits = wide @ weight.double().t() + bias.to(dtype).double()
    exact = F.cross_entropy(logits, labels, reduction="sum")
    exact.backward()
    assert given.grad is not None and wide.grad is not None and given.grad.shape == (rows, 9)
    assert abs(loss.item() - exact.item()) < TOLERANCE[dtype] * exact.item()
    assert relative(given.grad, wide.grad, wide.grad.abs() + 1.0) < TOLERANCE[dtype]


def test_no_rows_give_zero_and_an_empty_gradient() -> None:
    hidden = torch.zeros(0, 6, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.ones(9, 6), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and hidden.grad.shape == (0, 6)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_large_logits_stay_finite(scale: float) -> None:
    hidden, weight, labels, _ = problem(5, 6, 9, torch.float32, with_bias=False)
    leaf = (hidden * scale).requires_grad_()
    loss = linear_cross_entropy(leaf, weight, labels)
    loss.backward()
    assert leaf.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(leaf.grad).all()
    torch.testing.assert_close(loss.double(), definition(leaf.detach().double(), weight, labels, None))


def test_gradcheck() -> None:
    hidden, weight, labels, bias = problem(5, 4, 7, torch.float64, with_bias=True)

    def loss(leaf: Tensor) -> Tensor:
        return linear_cross_entropy(leaf, weight, labels, bias=bias, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, [hidden.requires_grad_()])


def test_the_scale_of_the_loss_is_not_rounded_to_bfloat16() -> None:
    """1 / 1500 in bfloat16 is off by 0.2 %, and so would be the whole gradient."""
    hidden, weight, labels, _ = problem(64, 32, 50, torch.bfloat16, with_bias=False)
    plain, scaled = (hidden.clone().requires_grad_() for _ in range(2))
    linear_cross_entropy(plain, weight, labels).backward()
    (linear_cross_entropy(scaled, weight, labels) / 1500).backward()
    assert plain.grad is not None and scaled.grad is not None
    ratio = (scaled.grad.double() * plain.grad.double()).sum() / (plain.grad.double() ** 2).sum()
    assert abs(ratio.item() * 1500 - 1) < 3e-4


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_head_that_is_trained_is_refused(trained: str) -> None:
    """Its gradient would be missing without a word."""
    hidden, weight, labels, bias = problem(5, 4, 7, torch.float32, with_bias=True)
    assert bias is not None
    {"weight": weight, "bias": bias}[trained].requires_grad_()
    with pytest.raises(GraftError, match="head"):
        linear_cross_entropy(hidden, weight, labels, bias=bias)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, bias=bias)


def test_nothing_is_kept_when_no_gradient_is_needed() -> None:
    hidden, weight, labels, _ = problem(5, 4, 7, torch.float32, with_bias=False)
    loss, gradient = torch.ops.graft.linear_cross_entropy(hidden, weight, None, labels, 2, False)
    assert gradient.numel() == 0
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels))


@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_passes_opcheck(need_grad: bool, with_bias: bool, dtype: torch.dtype) -> None:
    hidden, weight, labels, bias = problem(5, 4, 7, dtype, with_bias=with_bias)
    torch.library.opcheck(torch.ops.graft.linear_cross_entropy, (hidden, weight, bias, labels, 2, need_grad))
    strided = hidden.T.contiguous().T
    torch.library.opcheck(torch.ops.graft.linear_cross_entropy, (strided, weight, bias, labels, 2, need_grad))
