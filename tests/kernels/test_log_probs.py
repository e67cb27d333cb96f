"""Log-probabilities and entropies of rows against log-softmax of all logits in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from graftlm.core.errors import TrainingError
from graftlm.kernels import cross_entropy, log_probs
from graftlm.kernels.log_probs import linear_log_probs
from graftlm.kernels.native import pointwise_call as native
from graftlm.objectives.packed_head import packed_log_probs
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme

Problem = tuple[Tensor, Tensor, Tensor, Tensor | None]


def problem(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, *, with_bias: bool = False
) -> Problem:
    random = torch.Generator().manual_seed(rows + width + vocabulary)
    hidden = torch.randn(rows, width, generator=random).to(dtype)
    weight = torch.randn(vocabulary, width, generator=random).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=random)
    bias = torch.randn(vocabulary, generator=random).to(dtype) if with_bias else None
    return hidden, weight, labels, bias


def definition(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight.double(), None if bias is None else bias.double())
    known = (scale * logits).log_softmax(-1)
    return known.gather(1, labels.unsqueeze(1)).squeeze(1), -(known.exp() * known).sum(-1).detach()


@pytest.fixture(params=["compiled", "plain torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain torch":
        monkeypatch.setattr(native, "library", lambda: None)
    return str(request.param)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 23),
    width=st.integers(1, 17),
    vocabulary=st.integers(1, 37),
    chunk=st.integers(1, 30),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 0.7, 2.5]),
    with_bias=st.booleans(),
)
def check_values_and_gradients(
    rows: int, width: int, vocabulary: int, chunk: int, dtype: torch.dtype, scale: float, with_bias: bool
) -> None:
    hidden, weight, labels, bias = problem(rows, width, vocabulary, dtype, with_bias=with_bias)
    upstream = torch.linspace(-1.0, 2.0, rows)  # each row its own: what a sum cannot tell
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found, entropy = linear_log_probs(
        ours, weight, labels, bias=bias, scale=scale, chunk_rows=chunk, with_entropy=True
    )
    wanted, spread = definition(exact, weight, labels, bias, scale)
    assert found.dtype == entropy.dtype == torch.promote_types(dtype, torch.float32)
    (gradient,) = torch.autograd.grad(found, ours, upstream.to(found.dtype))
    (truth,) = torch.autograd.grad(wanted, exact, upstream.double())
    near = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=near, atol=near)
    torch.testing.assert_close(entropy.double(), spread, rtol=2 * near, atol=near)
    assert (gradient.double() - truth).norm() <= near * truth.norm().clamp_min(0.1)


@pytest.mark.usefixtures("way")
def test_values_and_gradients_are_those_of_the_definition() -> None:
    check_values_and_gradients()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("rows", "together"), [(13, 5), (230, 100)], ids=str)
def test_many_rows_and_pieces(rows: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS", together)
    hidden, weight, labels, bias = problem(rows, 6, 700, torch.float64, with_bias=True)
    wanted = definition(hidden, weight, labels, bias, 1.3)
    found = linear_log_probs(hidden, weight, labels, bias=bias, scale=1.3, chunk_rows=2, with_entropy=True)
    for mine, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, value)


def test_a_label_of_bfloat16_logits_is_not_rounded() -> None:
    """Logits near 30 are multiples of 0.125 in bfloat16: so are log-probabilities, if the label's is one."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 64, generator=random).index_fill(1, torch.tensor(0), 1.0).bfloat16()
    hidden = torch.randn(50, 64, generator=random).mul(0.1).index_fill(1, torch.tensor(0), 30.0).bfloat16()
    labels = torch.randint(4000, (50,), generator=random)
    found, _ = linear_log_probs(hidden, weight, labels)
    wanted, _ = definition(hidden.double(), weight, labels, None, 1.0)
    rounded = F.linear(hidden, weight).float().log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    assert (found - wanted).abs().max() < 0.2 * (rounded - wanted).abs().max()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_through_a_packed_head(kind: str, with_bias: bool) -> None:
    hidden, weight, labels, bias = problem(9, 24, 101, torch.float64, with_bias=with_bias)
    packed = encode(weight, Scheme(kind))
    ours, exact = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found, entropy = packed_log_probs(ours, packed, labels, bias, scale=0.8, with_entropy=True)
    wanted, spread = definition(exact, packed.decode(torch.float64), labels, bias, 0.8)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(entropy, spread)
    upstream = torch.linspace(-1, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, ours, upstream), torch.autograd.grad(wanted, exact, upstream)
    )


def test_the_entropy_is_a_constant_and_comes_when_asked_for() -> None:
    hidden, weight, labels, _ = problem(4, 6, 9, torch.float32)
    leaf = hidden.requires_grad_()
    values, entropy = linear_log_probs(leaf, weight, labels)
    assert values.requires_grad and entropy.numel() == 0
    assert not linear_log_probs(leaf, weight, labels, with_entropy=True)[1].requires_grad
    with torch.no_grad():
        _, spread = linear_log_probs(leaf, weight, labels, with_entropy=True)
    torch.testing.assert_close(spread, definition(leaf.double(), weight, labels, None, 1.0)[1].float())


def test_a_value_that_is_not_finite_is_not_hidden() -> None:
    hidden, weight, labels, _ = problem(3, 8, 300, torch.float32)
    for value in (torch.nan, torch.inf):
        broken = hidden.index_fill(0, torch.tensor(1), value)
        found, _ = linear_log_probs(broken, weight, labels)
        assert found.isfinite().tolist() == [True, False, True]


def test_a_trained_head_is_refused() -> None:
    hidden, weight, labels, _ = problem(3, 8, 30, torch.float32)
    with pytest.raises(TrainingError, match="head requires gradients"):
        linear_log_probs(hidden, weight.requires_grad_(), labels)


@pytest.mark.parametrize("need_entropy", [True, False])
def test_the_form_of_cuda(need_entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton's kernel stood in for: losses come back, and logits become their gradient."""

    def losses(logits: Tensor, labels: Tensor, need_grad: bool) -> Tensor:
        found = F.cross_entropy(logits, labels, reduction="none")
        logits.copy_(logits.softmax(-1) - F.one_hot(labels, logits.shape[1]))
        return found

    monkeypatch.setattr(log_probs, "triton_form", lambda name, *tensors: losses)
    monkeypatch.setattr(log_probs, "ROWS_ON_CUDA", 4)
    hidden, weight, labels, bias = problem(9, 6, 40, torch.float32, with_bias=True)
    exact = hidden.double().requires_grad_()
    wanted, spread = definition(exact, weight, labels, bias, 0.7)
    (truth,) = torch.autograd.grad(wanted.sum(), exact)
    found = log_probs.on_cuda(hidden, weight, bias, labels, 0.7, 2, True, need_entropy)
    torch.testing.assert_close(found.log_probs.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gradient.double(), truth, rtol=1e-4, atol=1e-5)
    if need_entropy:
        torch.testing.assert_close(found.entropy.double(), spread, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = problem(700, 64, 5000, dtype)
    weight = weight * 0.3
    leaf, exact = hidden.cuda().requires_grad_(), hidden.double().requires_grad_()
    found, entropy = linear_log_probs(leaf, weight.cuda(), labels.cuda(), with_entropy=True)
    wanted, spread = definition(exact, weight, labels, None, 1.0)
    upstream = torch.linspace(-1.0, 2.0, 700)
    (gradient,) = torch.autograd.grad(found, leaf, upstream.cuda())
    (truth,) = torch.autograd.grad(wanted, exact, upstream.double())
    near = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=near, atol=near)
    torch.testing.assert_close(entropy.double().cpu(), spread, rtol=near, atol=near)
    assert (gradient.double().cpu() - truth).norm() <= near * truth.norm()


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True), (False, False)])
def test_operator(need: tuple[bool, bool]) -> None:
    hidden, weight, labels, bias = problem(7, 8, 30, torch.bfloat16, with_bias=True)
    torch.library.opcheck(torch.ops.graft.linear_log_probs, (hidden, weight, bias, labels, 0.5, 3, *need))
