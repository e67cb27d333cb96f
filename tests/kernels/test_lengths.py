"""Lengths of changed rows against their definition in float64; the compiled code against the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core import compiling
from graftlm.kernels import lengths as module
from graftlm.kernels import lengths_cpu
from graftlm.kernels.lengths import changed_lengths
from graftlm.kernels.ops import row_products

from .drawn import draw

GRAFT = torch.ops.graft
RANKS = st.one_of(st.integers(1, 20), st.sampled_from([64, 127, 128, 129]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 40), RANKS,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.sampled_from([0.0, 0.5, 2.0]),
)  # fmt: skip
def test_values_are_those_of_the_definition(n: int, k: int, r: int, dtype: torch.dtype, scale: float) -> None:
    precise = torch.promote_types(dtype, torch.float32)
    weight, a, b = (
        draw(n, k, dtype=dtype),
        draw(r, k, dtype=precise, seed=1),
        draw(n, r, dtype=precise, seed=2),
    )
    squares, products = row_products(weight, a)
    found = changed_lengths(squares, products, a, b, scale)
    assert found.dtype == precise and found.shape == (n,)
    exact = (weight.double() + scale * b.double() @ a.double()).norm(dim=1)
    sizes = (weight.double().abs() + scale * b.double().abs() @ a.double().abs()).norm(dim=1)
    near = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 6e-2}[
        dtype
    ]  # of a root of a difference
    assert ((found.double() - exact).abs() <= near * sizes).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), RANKS, st.sampled_from([0.5, 2.0]))
def test_the_compiled_code_gives_the_values_of_the_plain_one(n: int, r: int, scale: float) -> None:
    if compiling.find_compiler() is None or compiling.is_switched_off():
        pytest.skip("no C compiler")
    a, b, products = draw(r, 9), draw(n, r, seed=1), draw(n, r, seed=2)
    squares = 100.0 + draw(n, seed=3).square()
    found = lengths_cpu.lengths(squares, products, a, b, scale)
    expected = module._changed_lengths(squares, products, a, b, scale)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * r * scale)


def test_special_values() -> None:
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    for squares, expected in ((0.0, 0.0), (-1e-3, 0.0), (4.0, 2.0), (float("inf"), float("inf"))):
        assert changed_lengths(torch.tensor([squares]), zero, one.t(), zero, 1.0).item() == expected
    assert changed_lengths(torch.tensor([float("nan")]), zero, one.t(), zero, 1.0).isnan().all()


def test_autocast_changes_nothing() -> None:
    a, b = draw(3, 40), draw(5, 3, seed=1)
    squares, products = row_products(draw(5, 40, seed=2), a)
    expected = changed_lengths(squares, products, a, b, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(changed_lengths(squares, products, a, b, 1.0), expected)
        assert torch.equal(module._changed_lengths(squares, products, a, b, 1.0).round(decimals=3),
                           expected.round(decimals=3))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_passes_opcheck(dtype: torch.dtype) -> None:
    squares, products = row_products(draw(5, 4, dtype=dtype), draw(2, 4, dtype=dtype))
    torch.library.opcheck(
        GRAFT.changed_lengths, (squares, products, draw(2, 4, dtype=dtype), draw(5, 2, dtype=dtype), 0.5)
    )
