from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftlm.core.errors import DataError, ModelError
from graftlm.evaluation.compare import forgetting
from graftlm.evaluation.known_text import OPENING, known_from_texts, sample_known_text
from graftlm.evaluation.rows import IGNORED, Tokens, target_count
from graftlm.evaluation.runner import evaluate


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampled_text_starts_from_the_begin_token(
    kind: str, make_model: Callable[..., Any], letters: Any
) -> None:
    found = sample_known_text(make_model(kind), letters, rows=12, tokens=20, seed=3)
    assert all(row.input_ids[0] == 0 and row.labels[0] == IGNORED for row in found)
    assert all(row.input_ids[1:] == row.labels[1:] for row in found)
    assert all(1 <= target_count(row) <= 20 for row in found)
    # An end token that was written is a target, and nothing follows it.
    assert all(1 not in row.input_ids[1:-1] for row in found)
    assert any(row.input_ids[-1] == 1 for row in found) or all(target_count(row) == 20 for row in found)


def test_the_seed_decides(make_model: Callable[..., Any], letters: Any) -> None:
    first = sample_known_text(make_model(), letters, rows=6, tokens=10, seed=1)
    assert first == sample_known_text(make_model(), letters, rows=6, tokens=10, seed=1)
    assert first != sample_known_text(make_model(), letters, rows=6, tokens=10, seed=2)


def test_openings_are_given_and_not_scored(
    make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]], letters: Any
) -> None:
    rows = make_rows(3)
    found = sample_known_text(make_model(), letters, rows=7, tokens=10, openings=rows)
    for row in found:
        prompt = rows[(row.row - 1) % 3].input_ids[: rows[(row.row - 1) % 3].labels.count(IGNORED)]
        given = row.labels.count(IGNORED)
        assert row.input_ids[:given] == prompt[:OPENING]


def test_text_is_never_longer_than_the_context(make_model: Callable[..., Any], letters: Any) -> None:
    found = sample_known_text(make_model("gpt2"), letters, rows=2, tokens=500)
    assert max(len(row.input_ids) for row in found) <= 64


def test_a_base_that_ends_every_text_at_once_is_refused(make_model: Callable[..., Any], letters: Any) -> None:
    base = make_model()

    def always_end(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits[..., 1] = 1e4
        return output

    base.register_forward_hook(always_end)
    with pytest.raises(ModelError, match="wrote no text"):
        sample_known_text(base, letters, rows=2, tokens=5)


def test_without_begin_token_openings_are_needed(make_model: Callable[..., Any]) -> None:
    class Bare:
        bos_token_id = None
        eos_token_id = None

    base = make_model()
    base.config.bos_token_id = None
    with pytest.raises(ModelError, match="no begin token"):
        sample_known_text(base, Bare(), rows=2, tokens=5)


def test_rise_on_sampled_text_estimates_the_divergence(make_model: Callable[..., Any], letters: Any) -> None:
    """The loss rises by KL(base || changed), here known exactly: only the first token is drawn."""
    base, changed = make_model(), make_model()
    with torch.no_grad():
        changed.lm_head.weight += 0.05 * torch.randn(
            changed.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
        start = torch.tensor([[0]])
        old = base(start).logits[0, -1].double().log_softmax(-1)
        new = changed(start).logits[0, -1].double().log_softmax(-1)
    divergence = float((old.exp() * (old - new)).sum())
    rows = sample_known_text(base, letters, rows=3000, tokens=1, rows_per_batch=3000)
    assert len(rows) == 3000
    found = forgetting(
        evaluate(base, letters, rows, name="base", most_answers=0, rows_per_batch=3000),
        evaluate(changed, letters, rows, name="changed", most_answers=0, rows_per_batch=3000),
        source="own text",
    )
    assert found.loss.difference.low <= divergence <= found.loss.difference.high
    assert divergence > 0


def test_texts_of_a_file_become_rows(letters: Any) -> None:
    found = known_from_texts(["abc", "", "z", "hello there"], letters, max_length=5)
    assert [row.row for row in found] == [1, 4]
    assert found[1].input_ids == tuple(letters("hello")["input_ids"])
    assert found[0].labels == (IGNORED, *found[0].input_ids[1:])
    with pytest.raises(DataError, match="at least two tokens"):
        known_from_texts(["", "a"], letters, max_length=5)
