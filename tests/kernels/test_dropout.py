"""Dropout by a counter: the compiled code gives the definition's bits; the mask is random enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core import compiling
from graftlm.kernels import dropout, dropout_cpu
from graftlm.kernels.dropout import add_dropped, dropped, keep_mask, kept_share, threshold

from .drawn import draw

CPU = torch.device("cpu")
SEED = torch.tensor(1234)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9),
    st.sampled_from([1, 2, 3, 31, 64, 1023, 1024, 1025, 2050]),
    st.floats(0.001, 0.999),
    st.integers(0, 2**62 - 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_both_forms_give_the_same_bits(
    rows: int, columns: int, p: float, seed: int, dtype: torch.dtype
) -> None:
    x, total = draw(rows, columns, dtype=dtype), draw(rows, columns, dtype=dtype, seed=1)
    key = torch.tensor(seed)
    expected = torch.where(keep_mask(x.shape, p, key, CPU), x, 0)
    assert torch.equal(dropped(x, p, key), expected)
    assert torch.equal(dropout._dropped(x, p, key), expected)
    sums = total.clone()
    add_dropped(sums, x, p, key)
    assert torch.equal(sums, total + expected)


def test_the_compiled_form_runs_here() -> None:
    if compiling.find_compiler() is None or compiling.is_switched_off():
        pytest.skip("no C compiler")
    assert dropout_cpu.dropped(draw(2, 3), threshold(0.5), SEED) is not None


def test_special_values_pass_and_what_is_dropped_is_zero() -> None:
    x = torch.tensor([float("nan"), float("inf"), -1.0, -0.0]).repeat(1, 64)
    for dtype in (torch.float32, torch.bfloat16):
        given_ = x.to(dtype)
        found, keep = dropped(given_, 0.5, SEED), keep_mask(given_.shape, 0.5, SEED, CPU)
        assert torch.equal(found[~keep], torch.zeros_like(found[~keep]))
        assert torch.equal(found[keep].isnan(), given_[keep].isnan())
        sums = torch.ones_like(given_)
        add_dropped(sums, given_, 0.5, SEED)
        assert torch.equal(sums.isnan(), torch.where(keep, given_, 0).isnan())


def test_strided_tensors() -> None:
    x, out = draw(8, 6).T, torch.zeros(8, 6).T
    expected = torch.where(keep_mask(x.shape, 0.5, SEED, CPU), x, 0)
    assert torch.equal(dropped(x, 0.5, SEED), expected)
    add_dropped(out, x, 0.5, SEED)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_the_right_share_is_kept_overall_by_row_and_by_column(p: float) -> None:
    mask = keep_mask(torch.Size((512, 768)), p, SEED, CPU).double()
    share = kept_share(p)
    assert abs(share - (1 - p)) <= 2.0**-17
    deviation = (share * (1 - share)) ** 0.5
    assert abs(mask.mean() - share) < 5 * deviation / mask.numel() ** 0.5
    for axis in (0, 1):
        means = mask.mean(axis)
        assert (means - share).abs().max() < 5.5 * deviation / mask.shape[axis] ** 0.5
        spread = means.var() * mask.shape[axis] / deviation**2  # 1 where places are independent
        assert abs(spread - 1) < 5 * (2 / len(means)) ** 0.5


def test_neighbours_rows_halves_and_seeds_are_independent() -> None:
    shape = torch.Size((600, 800))
    mask, other, next_one = (
        keep_mask(shape, 0.5, torch.tensor(seed), CPU).double() * 2 - 1 for seed in (5, 6_000_000, 10**17)
    )
    pairs = [(mask, other), (mask, next_one)]
    for step in (1, 2, 16, 32, 256):
        pairs += [(mask[:, step:], mask[:, :-step]), (mask[step:], mask[:-step])]
    pairs += [(mask[1:, 1:], mask[:-1, :-1]), (mask[1:, :-1], mask[:-1, 1:])]
    for left, right in pairs:
        assert abs((left * right).mean()) < 5 / left.numel() ** 0.5


def test_every_one_of_the_16_bits_counts() -> None:
    """A threshold of one in 65536 drops about as many, at one place in 65536."""
    mask = keep_mask(torch.Size((1024, 2048)), 2.0**-16, SEED, CPU)
    assert abs(int((~mask).sum()) - 32) < 5 * 32**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_opcheck(dtype: torch.dtype) -> None:
    x, out = draw(6, 8, dtype=dtype), draw(6, 8, dtype=dtype)
    torch.library.opcheck(torch.ops.graft.dropped, (x, 0.25, SEED))
    torch.library.opcheck(torch.ops.graft.add_dropped, (out, x, 0.25, SEED))
