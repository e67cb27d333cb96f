"""Scores of labels against their definitions in plain Python, and against cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.evaluation.label_scores import (
    macro_f1,
    matthews,
    micro_f1,
    pearson,
    spans,
    spearman,
    squared_error,
)
from graftlm.evaluation.runner import EvaluatedRow

Pairs = list[tuple[int, int]]
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def labelled(pairs: Sequence[tuple[int, int]]) -> list[EvaluatedRow]:
    """(told, right) numbers of labels."""
    return [
        EvaluatedRow(row, "", 0.0, 1, figures={"predicted": float(told), "actual": float(right)})
        for row, (told, right) in enumerate(pairs)
    ]


def numbered(pairs: Sequence[tuple[float, float]]) -> list[EvaluatedRow]:
    return [
        EvaluatedRow(row, "", 0.0, 1, figures={"predicted_value": told, "actual_value": right})
        for row, (told, right) in enumerate(pairs)
    ]


@given(PAIRS)
def test_macro_f1_is_the_mean_over_the_classes_that_occur(pairs: Pairs) -> None:
    scores = []
    for label in {label for pair in pairs for label in pair}:
        right = sum(told == actual == label for told, actual in pairs)
        told = sum(told == label for told, _ in pairs)
        there = sum(actual == label for _, actual in pairs)
        precision, recall = right / told if told else 0.0, right / there if there else 0.0
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert macro_f1(labelled(pairs)) == pytest.approx(fmean(scores))


@given(PAIRS)
def test_matthews_is_the_correlation_of_indicators(pairs: Pairs) -> None:
    """Gorodkin: the sum over classes of covariances, by the square root of the product of variances."""

    def covariance(one: int, other: int) -> float:
        return sum(
            fmean((pair[one] == label) * (pair[other] == label) for pair in pairs)
            - fmean(pair[one] == label for pair in pairs) * fmean(pair[other] == label for pair in pairs)
            for label in range(4)
        )

    size = math.sqrt(max(0.0, covariance(0, 0)) * max(0.0, covariance(1, 1)))
    expected = covariance(0, 1) / size if size > 1e-9 else 0.0
    assert matthews(labelled(pairs)) == pytest.approx(expected, abs=1e-9)


def test_by_hand() -> None:
    rows = labelled([(0, 0), (0, 1), (1, 1), (1, 1)])
    assert macro_f1(rows) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert matthews(rows) == pytest.approx(1 / math.sqrt(3))
    assert matthews(labelled([(0, 0), (0, 1)])) == 0.0


def test_numbers() -> None:
    rows = numbered([(1.0, 2.0), (2.0, 4.0), (3.0, 7.0)])
    assert pearson(rows) == pytest.approx(5 / math.sqrt(2 * 38 / 3))
    assert spearman(rows) == pytest.approx(1.0)
    assert squared_error(rows) == pytest.approx((1 + 4 + 16) / 3)
    assert pearson(numbered([(1.0, 2.0), (1.0, 3.0)])) == 0.0
    tied = numbered([(1.0, 1.0), (1.0, 2.0), (2.0, 3.0)])  # ranks 1.5, 1.5, 3 and 1, 2, 3
    assert spearman(tied) == pytest.approx(math.sqrt(3) / 2)


def test_hits_of_all_rows() -> None:
    figures = [{"hits": 1.0, "told": 2.0, "wanted": 1.0}, {"hits": 0.0, "told": 0.0, "wanted": 1.0}]
    rows = [EvaluatedRow(row, "", 0.0, 1, figures=each) for row, each in enumerate(figures)]
    assert micro_f1(rows) == pytest.approx(2 * 1 / (2 + 2))
    empty = EvaluatedRow(1, "", 0.0, 1, figures={"hits": 0.0, "told": 0.0, "wanted": 0.0})
    assert micro_f1([empty]) == 0.0


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-A I-A O", {("A", 0, 2)}),
        ("B-A B-A", {("A", 0, 1), ("A", 1, 2)}),
        ("I-A I-B", {("A", 0, 1), ("B", 1, 2)}),
        ("B-A I-B", {("A", 0, 1), ("B", 1, 2)}),
        ("S-A B-A E-A", {("A", 0, 1), ("A", 1, 3)}),
        ("B-A L-A U-B", {("A", 0, 2), ("B", 2, 3)}),
        ("NOUN VERB O", {("NOUN", 0, 1), ("VERB", 1, 2)}),
        ("O I-A", {("A", 1, 2)}),
        ("B-A O I-A", {("A", 0, 1), ("A", 2, 3)}),
    ],
)
def test_spans(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert spans(tags.split()) == found
