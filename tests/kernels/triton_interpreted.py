"""Triton's kernels against float64, in its interpreter on a CPU. Run with TRITON_INTERPRET=1.

The interpreter cuts bfloat16 off where a GPU rounds, so that its error there is twice a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graftlm.kernels import cross_entropy_cuda, dropout, pointwise_reference, thin
from graftlm.kernels.triton import cross_entropy as triton_cross_entropy
from graftlm.kernels.triton import dropout as triton_dropout
from graftlm.kernels.triton import forms as triton_forms
from graftlm.kernels.triton import fp8 as triton_fp8
from graftlm.kernels.triton import gating as triton_gating
from graftlm.kernels.triton import low_rank as triton_low_rank
from graftlm.kernels.triton import norms as triton_norms
from graftlm.kernels.triton import rotary as triton_rotary

ULPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2**-6}
SHAPES = [(1, 1), (3, 5), (7, 129), (2, 1500)]


def values(*shape: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * spread).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers as part of wider rows."""
    wide = torch.full((len(tensor), tensor.shape[1] + 3), 1e4, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    tolerance = ULPS[dtype]
    size = max(1.0, exact.abs().max().item())  # what cancels was of size 1
    assert found.dtype == dtype, found.dtype
    difference = (found.double() - exact).abs()
    assert (difference <= tolerance * (exact.abs() + 0.25 * size)).all(), difference.max()


def norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, grad, weight = (values(*s, dtype=dtype, seed=n) for n, s in enumerate((shape, shape, shape[1:])))
    wide = x.double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    expected.backward(grad.double())
    out, scales = triton_norms.rms_norm(strided(x), weight, 1e-6)
    close(out, expected.detach(), dtype)
    assert wide.grad is not None
    close(triton_norms.rms_norm_backward(strided(grad), strided(x), weight, scales), wide.grad, dtype)


def gating(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, grad = (values(*shape, dtype=dtype, seed=n) for n in range(3))
    wide = [gate.double().requires_grad_(), up.double().requires_grad_()]
    expected = torch.nn.functional.silu(wide[0]) * wide[1]
    expected.backward(grad.double())
    close(triton_gating.gated_silu(strided(gate), up), expected.detach(), dtype)
    found = triton_gating.gated_silu_backward(grad, gate, strided(up))
    for mine, exact in zip(found, wide, strict=True):
        assert exact.grad is not None
        close(mine, exact.grad, dtype)


def low_rank(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for rank, own in ((1, dtype), (16, torch.float32), (70, dtype)):
        y = values(*shape, dtype=dtype)
        s = values(shape[0], rank, dtype=dtype, seed=1)
        b = values(shape[1], rank, dtype=own, seed=2, spread=0.1)
        expected = y.double() + 0.5 * s.double() @ b.to(dtype).double().t()
        for given in (b, b.t().contiguous().t()):
            out = torch.empty(shape, dtype=dtype)
            triton_low_rank.low_rank_into(out, strided(y), strided(s), given, 0.5)
            close(out, expected, dtype)
        triton_low_rank.low_rank_into(y, y, s, b, 0.5)
        assert torch.equal(y, out)


def cross_entropy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, vocabulary = shape[0], 5 * shape[1]  # the last is wider than what is in registers at a time
    logits = values(rows, vocabulary, dtype=dtype, spread=4.0)
    labels = torch.arange(rows).mul(7).remainder(vocabulary)
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    expected.sum().backward()
    held = strided(logits)
    close(triton_cross_entropy.losses_and_gradient_(held, labels, False), expected.detach(), torch.float32)
    assert torch.equal(held, logits)
    triton_cross_entropy.losses_and_gradient_(held, labels, True)
    assert wide.grad is not None
    close(held, wide.grad, dtype)


def dropping(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Equal to the bit: the same seed drops the same values on every device."""
    x, held = values(*shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    for number in (3, 2**61 + 12345):
        seed = torch.tensor(number)
        expected = dropout._dropped(x, 0.3, seed)
        assert torch.equal(triton_dropout.dropped(strided(x), dropout.threshold(0.3), seed), expected)
        out = held.clone()
        triton_dropout.add_dropped(out, x, dropout.threshold(0.3), seed)
        close(out, 1 + expected.double(), dtype)


def fp8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """On numbers that 8 bits hold: the interpreter rounds others without carrying."""
    whole = torch.arange(shape[0] * shape[1]).mul(7).remainder(15).sub(7).view(shape).float() * 64
    whole[:, 0] = -448.0
    factors = torch.full(shape[1:], 2.0)
    for given, spread in ((None, 0.25), (factors, 0.5)):
        codes, scales = triton_fp8.rows_in_fp8(strided((whole * 0.25).to(dtype)), given)
        assert torch.equal(codes.float(), whole), (codes.float(), whole)
        assert torch.equal(scales, torch.full(shape[:1], spread)), scales


def rotary(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Heads that turn in part, cosines for all rows together and for each, rows of any stride."""
    tokens, width = shape[0], 2 * min(shape[1], 40)
    q = values(tokens, 2 * 3 * width, dtype=dtype).view(2, tokens, 3, width).transpose(1, 2)
    k = values(tokens, 2 * width, dtype=dtype, seed=1).view(2, 1, tokens, width)
    for batch, turning in ((1, width), (2, max(2, width // 4 * 2))):
        angles = values(batch, tokens, turning // 2, dtype=torch.float32).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for inverse in (False, True):
            found = triton_rotary.rope(q, k, cos, sin, inverse)
            exact = pointwise_reference.rope(q.double(), k.double(), cos.double(), sin.double(), inverse)
            for mine, its in zip(found, exact, strict=True):
                assert mine.transpose(1, 2).is_contiguous()
                close(mine, its, dtype)


def operators(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What CUDA runs, on tensors of the CPU: rows that are not contiguous, more than one chunk, a bias."""
    rows, width = shape
    x = values(width, rows, dtype=dtype).t()
    plain = torch.nn.functional.silu(x.double())
    close(triton_forms.accelerated("gated_silu", reject)(x, torch.ones_like(x)), plain, dtype)
    y, s = values(rows, 7, dtype=dtype, seed=1), values(2, rows, dtype=dtype, seed=2).t()
    b = values(7, 2, dtype=dtype, seed=3)
    expected = y.double() + 0.5 * s.double() @ b.double().t()
    thin._add_low_rank_by_triton(y, s, b, 0.5)
    close(y, expected, dtype)
    weight, bias = values(30, width, dtype=dtype, seed=4), values(30, dtype=dtype, seed=5)
    hidden, labels = x.contiguous(), torch.arange(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy_cuda, "ROWS", 2)
        loss, grad = cross_entropy_cuda.linear_cross_entropy(hidden, weight, bias, labels, 1, True)
    wide = hidden.double().requires_grad_()
    logits = wide @ weight.double().t() + bias.double()
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    exact.backward()
    assert wide.grad is not None and abs(loss - exact) <= 4 * ULPS[dtype] * max(1.0, exact)
    assert (grad.double() - wide.grad).norm() <= 4 * ULPS[dtype] * max(1.0, wide.grad.norm())


def reject(*_: Tensor) -> Tensor:
    raise AssertionError("Triton's form fits")


CHECKS: tuple[Callable[[tuple[int, int], torch.dtype], None], ...] = (
    norms,
    gating,
    low_rank,
    cross_entropy,
    dropping,
    fp8,
    rotary,
    operators,
)

if __name__ == "__main__":
    for check in CHECKS:
        for shape in SHAPES:
            for dtype in ULPS:
                check(shape, dtype)
        print(check.__name__)
