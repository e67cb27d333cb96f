"""Products of low-rank factors against their definition in float64, compiled for several processors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.core import compiling
from graftlm.kernels import thin, thin_cpu

from .compiled import compiled
from .drawn import DTYPES, TOLERANCE, draw, relative

GRAFT = torch.ops.graft
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([96, 129, 200]))
RANKS = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 129, 512]))


def strided(rows: int, columns: int, extra: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Columns of a matrix that has `extra` more, so that its rows lie further apart."""
    return draw(rows, columns + extra, dtype=dtype, seed=seed)[:, extra // 2 :][:, :columns]


VARIANTS = {
    "this machine": (),
    "without a matrix unit": ("-mno-amx-tile",),
    "without bfloat16 instructions": ("-mno-amx-tile", "-mno-avx512bf16"),
}


@pytest.fixture(scope="module", params=VARIANTS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled code for such a processor, and without threads of its own."""
    folder = tmp_path_factory.mktemp("built")
    library = compiled(
        thin_cpu.SOURCE, "-march=native", "-Wno-unused-function", *VARIANTS[request.param], folder=folder
    )
    loaded = thin_cpu._load(library)
    loaded.graft_thin_state()
    if not hasattr(loaded, "graft_thin_gradient"):
        pytest.skip("the processor lacks AVX-512")
    return loaded


@pytest.fixture
def _fresh() -> Iterator[None]:
    thin_cpu._library.cache_clear()
    yield
    thin_cpu._library.cache_clear()


@settings(max_examples=120, deadline=None)
@given(SIZES, SIZES, RANKS, st.sampled_from([0, 3, 32]), st.sampled_from(DTYPES))
def test_values_are_those_of_the_definition(t: int, n: int, r: int, extra: int, dtype: torch.dtype) -> None:
    y, s, b = (strided(*size, extra, dtype, i) for i, size in enumerate([(t, n), (t, r), (n, r)]))
    exact = y.double() + 0.7 * s.double() @ b.double().t()
    size = y.double().abs() + 0.7 * s.double().abs() @ b.double().abs().t()
    found = GRAFT.thin_gradient(s, y, 0.7)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    of_b, terms = 0.7 * s.double().t() @ y.double(), 0.7 * s.double().abs().t() @ y.double().abs()
    assert relative(found, of_b, terms) < TOLERANCE[dtype]
    assert torch.equal(GRAFT.thin_gradient_turned(s, y, 0.7), found.t())
    GRAFT.add_low_rank(y, s, b, 0.7)
    assert relative(y, exact, size) < TOLERANCE[dtype]


@settings(max_examples=80, deadline=None)
@given(SIZES, SIZES, RANKS, st.sampled_from([0, 3, 32]), st.sampled_from(DTYPES), st.booleans())
def test_a_gain_and_the_sums_of_its_gradient_go_along(
    t: int, n: int, r: int, extra: int, dtype: torch.dtype, has_bias: bool
) -> None:
    y, s, b = (strided(*size, extra, dtype, i) for i, size in enumerate([(t, n), (t, r), (n, r)]))
    other, precise = strided(t, n, extra, dtype, 3), torch.promote_types(dtype, torch.float32)
    gain, bias = draw(n, dtype=precise, seed=4), draw(n, dtype=dtype, seed=5) if has_bias else None
    of_b, sums = GRAFT.thin_gradient_and_sums(s, y, other, 0.7)
    assert torch.equal(of_b, GRAFT.thin_gradient_turned(s, y, 0.7)) and sums.dtype == precise
    products = y.double() * other.double()
    assert relative(sums, products.sum(0), products.abs().sum(0)) < min(TOLERANCE[dtype], 1e-5)
    wide = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
    change = 0.7 * s.double() @ b.double().t()
    size = gain.double().abs() * (y.double().abs() + change.abs() + wide.abs()) + wide.abs()
    exact = gain.double() * (y.double() + change - wide) + wide
    GRAFT.add_low_rank_with_gain(y, s, b, 0.7, gain, bias)
    assert relative(y, exact, size) < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(t=SIZES, n=SIZES, r=st.integers(1, thin_cpu.HIGHEST), extra=st.sampled_from([0, 3, 32]))
def test_the_compiled_gain_rounds_once_and_its_sums_are_exact(
    built: ctypes.CDLL, t: int, n: int, r: int, extra: int
) -> None:
    whole = draw(t + 2, n + extra + 2, dtype=torch.bfloat16)
    before, y = whole.clone(), whole[1 : 1 + t, 1 : 1 + n]
    s, b = strided(t, r, extra, torch.bfloat16, 1), strided(n, r, extra, torch.bfloat16, 2)
    gain, bias, other = (
        draw(n, seed=3),
        draw(n, dtype=torch.bfloat16, seed=4),
        draw(t, n, dtype=torch.bfloat16),
    )
    products, old = y.double() * other.double(), y.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin_cpu, "_library", lambda: built)
        found = thin_cpu.gradient_and_sums(s, y, other, 1.0)
        alone = thin_cpu.gradient_turned(s, y, 1.0)
        assert thin_cpu.add_with_gain(y, s, b, -1.3, gain, bias)
    assert found is not None and alone is not None and torch.equal(found[0], alone)
    assert ((found[1].double() - products.sum(0)).abs() <= 1e-5 * products.abs().sum(0)).all()
    changed = old - 1.3 * s.double() @ b.double().t()
    exact = gain.double() * (changed - bias.double()) + bias.double()
    sizes = old.abs() + 1.3 * s.double().abs() @ b.double().abs().t() + bias.double().abs()
    assert (
        (y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5 * (gain.abs() * sizes + bias.abs())
    ).all()
    y.copy_(before[1 : 1 + t, 1 : 1 + n])
    assert torch.equal(whole, before)


@settings(max_examples=60, deadline=None)
@given(t=SIZES, n=SIZES, r=st.integers(1, thin_cpu.HIGHEST), extra=st.sampled_from([0, 3, 32]))
def test_the_compiled_code_rounds_once_and_writes_nothing_else(
    built: ctypes.CDLL, t: int, n: int, r: int, extra: int
) -> None:
    whole = draw(t + 2, n + extra + 2, dtype=torch.bfloat16)
    before, y = whole.clone(), whole[1 : 1 + t, 1 : 1 + n]
    s, b = strided(t, r, extra, torch.bfloat16, 1), strided(n, r, extra, torch.bfloat16, 2)
    sums, size = s.double().t() @ y.double(), s.double().abs().t() @ y.double().abs()
    added = y.double() - 1.3 * s.double() @ b.double().t()
    near = 2.0**-8 * added.abs() + 1e-5 * (y.abs() + s.double().abs() @ b.double().abs().t())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin_cpu, "_library", lambda: built)
        found, turned = thin_cpu.gradient(s, y, 1.0), thin_cpu.gradient_turned(s, y, 1.0)
        assert thin_cpu.add(y, s, b, -1.3)
    assert found is not None and turned is not None and torch.equal(found.t(), turned)
    assert ((found.double() - sums).abs() <= 1e-5 * size).all() and turned.is_contiguous()
    assert ((y.double() - added).abs() <= near).all()
    y.copy_(before[1 : 1 + t, 1 : 1 + n])
    assert torch.equal(whole, before)


@pytest.mark.parametrize(("t", "n", "r"), [(200, 331, 16), (65, 40, 33), (5, 5, 64)])
def test_results_do_not_depend_on_the_number_of_threads(t: int, n: int, r: int) -> None:
    y, s, b = (draw(*size, dtype=torch.bfloat16) for size in [(t, n), (t, r), (n, r)])
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = y.clone()
            GRAFT.add_low_rank(out, s, b, 0.5)
            GRAFT.add_low_rank_with_gain(out, s, b, 0.5, draw(n), None)
            found = GRAFT.thin_gradient(s, y, 0.5), *GRAFT.thin_gradient_and_sums(s, y, y, 0.5)
            results.append((out, torch.cat([one.flatten() for one in found])))
    finally:
        torch.set_num_threads(before)
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_added_or_summed_over_where_there_is_nothing(dtype: torch.dtype) -> None:
    y = draw(4, 3, dtype=dtype)
    GRAFT.add_low_rank(out := y.clone(), y[:, :0], y[:3, :0], 1.0)
    assert torch.equal(out, y)
    assert torch.equal(GRAFT.thin_gradient(y[:0], y[:0], 1.0), torch.zeros(3, 3))


def test_shapes_that_do_not_fit_are_an_error() -> None:
    y = draw(4, 3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        GRAFT.add_low_rank(y, y[:3], draw(3, 3, dtype=torch.bfloat16), 1.0)
    with pytest.raises(RuntimeError):
        GRAFT.thin_gradient(y[:3], y, 1.0)
    with pytest.raises(RuntimeError):
        GRAFT.thin_gradient_and_sums(y, y, y[:, :2], 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_opcheck(dtype: torch.dtype) -> None:
    y, s, b = draw(6, 5, dtype=dtype), draw(6, 8, dtype=dtype)[:, 2:4], draw(5, 2, dtype=dtype)
    torch.library.opcheck(GRAFT.add_low_rank, (y, s, b, 0.5))
    torch.library.opcheck(GRAFT.thin_gradient, (s, y, 0.5))
    torch.library.opcheck(GRAFT.thin_gradient_turned, (s, y, 0.5))
    torch.library.opcheck(GRAFT.thin_gradient_and_sums, (s, y, y, 0.5))
    for bias in (None, draw(5, dtype=dtype)):
        torch.library.opcheck(GRAFT.add_low_rank_with_gain, (y, s, b, 0.5, draw(5), bias))


@pytest.mark.usefixtures("_fresh")
def test_the_compiled_code_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.SWITCH, "0")
    y, s, b = (draw(*size, dtype=torch.bfloat16) for size in [(6, 5), (6, 2), (5, 2)])
    assert not thin_cpu.add(y.clone(), s, b, 0.5)
    assert thin_cpu.gradient(s, y, 0.5) is None
    assert torch.equal(GRAFT.thin_gradient(s, y, 0.5), thin._thin_gradient(s, y, 0.5))
