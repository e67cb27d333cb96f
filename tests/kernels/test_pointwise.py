"""Fused elementwise layers against the separate operations that models write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels.pointwise import gated_silu, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers' Llama has it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out.dtype))


@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 1, 700), (700, 300), (5, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1]).to(dtype)
    found = rms_norm(x, weight, 1e-5)
    assert torch.equal(found, norm(x, weight, 1e-5))
    precise = x.detach().double().requires_grad_()
    definition = weight.double() * precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + 1e-5)
    (dx,), (expected,) = gradients(found, x), gradients(definition, precise)
    (theirs,) = gradients(norm(x, weight, 1e-5), x)
    assert dx.dtype == dtype
    error, its_error = ((d.double() - expected).abs().max() for d in (dx, theirs))
    assert error <= 1.5 * its_error + 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 16), (700, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_silu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    found, expected = gated_silu(gate, up), F.silu(gate) * up
    assert torch.equal(found, expected)
    for mine, its in zip(gradients(found, gate, up), gradients(expected, gate, up), strict=True):
        assert torch.equal(mine, its)


def test_what_is_kept_for_backward() -> None:
    """The inputs themselves and one number a row: no copy of anything."""
    x, up = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        gated_silu(rms_norm(x, torch.ones(32), 1e-6), up)
    inputs = {x.data_ptr(), up.data_ptr()}
    fresh = [tensor for tensor in kept if tensor.data_ptr() not in inputs]
    assert sorted(tensor.numel() for tensor in fresh) == [
        32,
        64,
        64 * 32,
    ]  # weight, scales, the norm's output


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    def both(x: Tensor, up: Tensor) -> Tensor:
        return gated_silu(rms_norm(x, torch.ones(16), 1e-6), up)

    x, up = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, up), both(x, up))
    for mine, its in zip(gradients(compiled(x, up), x, up), gradients(both(x, up), x, up), strict=True):
        assert torch.allclose(mine, its)
