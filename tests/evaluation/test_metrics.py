from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.evaluation.metrics import (
    exact_match,
    mcnemar,
    normalise,
    paired_bootstrap,
    perplexity,
    share_of,
    student_quantile,
    wilson,
)


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_values(correct: int, rows: int, low: float, high: float) -> None:
    interval = wilson(correct, rows)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))))
def test_wilson_contains_the_share_and_is_symmetric(counts: tuple[int, int]) -> None:
    correct, rows = counts
    interval, mirrored = wilson(correct, rows), wilson(rows - correct, rows)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-12)


@pytest.mark.parametrize(("correct", "rows"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_not_a_share(correct: int, rows: int) -> None:
    with pytest.raises(ValueError, match="not a share"):
        wilson(correct, rows)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_sum(gained: int, lost: int) -> None:
    trials = gained + lost
    # Every outcome that is no likelier than the one seen, at probability 1/2 each.
    extreme = [k for k in range(trials + 1) if abs(2 * k - trials) >= abs(gained - lost)]
    exact = sum((Fraction(math.comb(trials, k), 2**trials) for k in extreme), Fraction(0))
    assert mcnemar(gained, lost) == pytest.approx(float(exact), rel=1e-12)


def test_mcnemar_stays_finite_for_thousands_of_rows() -> None:
    assert 0 < mcnemar(2700, 2500) < 0.01
    assert mcnemar(9000, 0) == 0.0  # below the smallest float


@pytest.mark.parametrize("freedom", [4, 9, 30])
def test_student_quantiles_agree_with_tables(freedom: int) -> None:
    table = {4: 2.776, 9: 2.262, 30: 2.042}
    assert student_quantile(0.975, freedom) == pytest.approx(table[freedom], rel=0.01)


def test_bootstrap_point_values_are_ratios_of_sums() -> None:
    change = paired_bootstrap([2.0, 12.0], [1.0, 9.0], [1, 4])
    assert (change.before.value, change.after.value) == (14 / 5, 10 / 5)
    assert change.difference.value == pytest.approx(-4 / 5)
    assert change.relative.value == pytest.approx(10 / 14 - 1)
    assert (change.rows, change.tokens) == (2, 5)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.gamma(2, 1, 50), generator.gamma(2, 1, 50)
    tokens = [3] * 50
    first = paired_bootstrap(list(before), list(after), tokens, seed=1)
    assert first == paired_bootstrap(list(before), list(after), tokens, seed=1)
    assert first != paired_bootstrap(list(before), list(after), tokens, seed=2)


def test_bootstrap_in_blocks_draws_the_same_rows_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [float(value) for value in range(1, 41)]
    whole = paired_bootstrap(rows, rows[::-1], [2] * 40, resamples=500)
    monkeypatch.setattr("graftlm.evaluation.metrics._GATHER", 40 * 100)
    assert paired_bootstrap(rows, rows[::-1], [2] * 40, resamples=500) == whole


@pytest.mark.parametrize("rows", [12, 40])
def test_bootstrap_covers_the_true_difference(rows: int) -> None:
    """Long rows are worse here, so that token weighting matters; truth is the ratio of expectations."""
    generator = np.random.default_rng(rows)
    repeats, covered = 600, 0
    # tokens uniform on 1..20; loss per token before 2 + tokens/40 + noise, after 0.3 lower on average.
    for _ in range(repeats):
        tokens = generator.integers(1, 21, rows)
        per_token = 2 + tokens / 40 + generator.gamma(2, 0.2, rows)
        gain = generator.gamma(3, 0.1, rows)
        change = paired_bootstrap(
            list(per_token * tokens),
            list((per_token - gain) * tokens),
            list(map(int, tokens)),
            resamples=1000,
        )
        covered += change.difference.low <= -0.3 <= change.difference.high
    # 3,000 repeats gave 0.935 at 12 rows and 0.942 at 40 (plain percentiles: 0.883 and 0.927).
    assert 0.915 <= covered / repeats <= 0.975


def test_paired_interval_is_narrower_than_either_side() -> None:
    generator = np.random.default_rng(3)
    before = generator.gamma(2, 1, 100)
    change = paired_bootstrap(list(before), list(before - 0.1), [1] * 100)
    assert change.difference.high - change.difference.low < 1e-9
    assert change.before.high - change.before.low > 0.3


@pytest.mark.parametrize(
    ("before", "after", "tokens"),
    [([], [], []), ([1.0], [math.nan], [1]), ([1.0], [1.0], [0])],
)
def test_bootstrap_refuses_rows_it_cannot_use(
    before: list[float], after: list[float], tokens: list[int]
) -> None:
    with pytest.raises(ValueError, match="row"):
        paired_bootstrap(before, after, tokens)


def test_exact_match_normalises_space_and_unicode_only() -> None:
    assert exact_match("caf\u0065\u0301\n bar", " caf\u00e9 bar ")
    assert not exact_match("Bar", "bar")
    assert not exact_match("bar.", "bar")
    assert normalise("\t") == ""


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf


def test_share_counts_true_flags() -> None:
    share = share_of([True, False, True, True])
    assert (share.correct, share.rows, share.interval.value) == (3, 4, 0.75)
