"""Sums and cuts of factored changes against the dense change in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.methods.combining import factors as module
from graftlm.methods.combining.factors import Factors, approximated, reduced, weighted_sum

sides = st.integers(1, 24)
ranks = st.integers(1, 9)
weights = st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3)


def factors(seed: int, out: int, width: int, rank: int, batch: tuple[int, ...] = ()) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    return Factors(draw(rank, width), draw(out, rank))


def close(ours: Tensor, exact: Tensor) -> None:
    assert float((ours - exact).norm()) <= 1e-11 * max(1.0, float(exact.norm()))


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.lists(st.tuples(ranks, weights), min_size=1, max_size=4), st.sampled_from([(), (3,)]))
def test_the_sum_is_the_sum(
    out: int, width: int, terms: list[tuple[int, float]], batch: tuple[int, ...]
) -> None:
    parts = [factors(seed, out, width, rank, batch) for seed, (rank, _) in enumerate(terms)]
    total = weighted_sum([weight for _, weight in terms], parts)
    assert total.rank == sum(rank for rank, _ in terms)
    assert total.sides == (out, width)
    assert total.square() == pytest.approx(float(total.dense().square().sum()), rel=1e-9, abs=1e-9)
    close(
        total.dense(),
        sum((w * part.dense() for (_, w), part in zip(terms, parts, strict=True)), torch.zeros(())),
    )


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_a_cut_is_the_best_of_its_rank(
    out: int, width: int, rank: int, wanted: int, from_dense: bool
) -> None:
    whole = factors(7, out, width, rank)
    exact = whole.dense()
    cut = approximated(exact, wanted) if from_dense else reduced(whole, wanted)
    u, values, v = torch.linalg.svd(exact, full_matrices=False)
    best = (u[:, :wanted] * values[:wanted]) @ v[:wanted]
    close(cut.factors.dense(), best)
    assert cut.factors.rank == min(wanted, out, width, out if from_dense else rank)
    assert cut.total == pytest.approx(float(exact.square().sum()), rel=1e-9)
    assert cut.kept == pytest.approx(float(best.square().sum()), rel=1e-9)
    assert 0 < cut.kept <= cut.total * (1 + 1e-12)


def test_a_batch_is_cut_one_by_one() -> None:
    whole = factors(3, 6, 5, 4, batch=(3,))
    cut = reduced(whole, 2)
    for number in range(3):
        alone = reduced(Factors(whole.a[number], whole.b[number]), 2)
        close(cut.factors.dense()[number], alone.factors.dense())


def test_nothing_stays_nothing() -> None:
    nothing = Factors(torch.ones(2, 5), torch.zeros(4, 2))
    for cut in (reduced(nothing, 1), approximated(nothing.dense(), 1)):
        assert not cut.factors.dense().any() and torch.isfinite(cut.factors.a).all()
        assert cut.kept == cut.total == 0


def test_a_large_matrix_is_cut_by_projection_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = factors(2, 300, 200, 200).dense() / 14
    dense = 3 * factors(1, 300, 200, 4).dense() + noise
    exact = approximated(dense, 8)
    monkeypatch.setattr(module, "EXACT_SIDE", 10)
    found = approximated(dense, 8)
    assert found.kept == pytest.approx(float(found.factors.dense().square().sum()), rel=1e-9)
    assert 0.999 * exact.kept < found.kept <= exact.kept
    again = approximated(dense, 8)
    assert torch.equal(found.factors.a, again.factors.a)
