from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftlm.core.errors import DataError
from graftlm.evaluation.perplexity import row_losses
from graftlm.evaluation.rows import IGNORED, Tokens
from graftlm.evaluation.runner import Evaluation, evaluate


@pytest.fixture(scope="module")
def evaluation(
    make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]], letters: Any
) -> Evaluation:
    rows = [*make_rows(7), Tokens((0, 5, 6), (IGNORED, 5, 6), row=50)]
    return evaluate(make_model(), letters, rows, name="base", most_answers=4)


def test_every_row_has_a_loss_and_some_have_answers(
    evaluation: Evaluation, make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]]
) -> None:
    losses = row_losses(make_model(), make_rows(7)).rows
    assert [row.row for row in evaluation.rows] == [1, 2, 3, 4, 5, 6, 7, 50]
    assert [row.loss_sum for row in evaluation.rows[:7]] == pytest.approx([row.loss_sum for row in losses])
    assert [row.row for row in evaluation.rows if row.matches is not None] == [1, 2, 4, 6]
    assert evaluation.rows[-1].matches is None
    assert evaluation.complete


def test_totals_are_weighted_by_tokens(evaluation: Evaluation) -> None:
    assert evaluation.tokens == sum(row.tokens for row in evaluation.rows)
    assert evaluation.loss == pytest.approx(
        sum(row.loss * row.tokens for row in evaluation.rows) / evaluation.tokens
    )
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss))
    assert evaluation.exact_match is not None
    assert evaluation.exact_match.rows == 4


def test_json_round_trip(evaluation: Evaluation) -> None:
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"name": 1, "rows": [{}]}'])
def test_what_is_not_an_evaluation_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not an evaluation"):
        Evaluation.from_json(text)


def test_progress_counts_both_passes(
    make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]], letters: Any
) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        make_model(),
        letters,
        make_rows(6),
        name="base",
        most_answers=3,
        rows_per_batch=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 9), (6, 9), (9, 9)]


@pytest.mark.parametrize("stops_after", [1, 3])
def test_a_stopped_evaluation_says_so(
    stops_after: int, make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]], letters: Any
) -> None:
    asked = iter(range(100))
    found = evaluate(
        make_model(),
        letters,
        make_rows(6),
        name="base",
        rows_per_batch=3,
        should_stop=lambda: next(asked) >= stops_after,
    )
    assert not found.complete
    assert len(found.rows) == (3 if stops_after == 1 else 6)


def test_a_loss_that_is_not_finite_names_its_rows(
    make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]], letters: Any
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(DataError, match="row 1: loss nan"):
        evaluate(model, letters, make_rows(3), name="broken", most_answers=0)
