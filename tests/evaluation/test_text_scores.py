"""Measures of written text against the libraries that define them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core.errors import MissingDependency
from graftlm.evaluation import text_scores
from graftlm.evaluation.measures import MEASURES
from graftlm.evaluation.metrics import normalise
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.evaluation.text_scores import NEEDED, SCORES, edits, require_packages, with_scores
from graftlm.training.recipe import Metric

WORDS = st.lists(st.sampled_from(["the", "a", "cat", "cats", "sat", "on", "mat", ",", ".", "über", "1.5"]))
TEXTS = WORDS.map(" ".join)
CORPUS = st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=6)


def evaluation(pairs: list[tuple[str, str]], names: list[str]) -> Evaluation:
    rows = tuple(
        EvaluatedRow(number, "", 1.0, 1, "in", prediction, reference)
        for number, (prediction, reference) in enumerate(pairs)
    )
    return with_scores(Evaluation("one", rows, 0.0, True, ""), names)


def value(pairs: list[tuple[str, str]], name: str) -> float:
    return MEASURES[name].value(evaluation(pairs, [name]).rows)


def table(first: str, second: str) -> int:
    """The definition, cell by cell."""
    rows = [list(range(len(second) + 1))]
    for i, a in enumerate(first, start=1):
        rows.append([i])
        for j, b in enumerate(second, start=1):
            rows[i].append(min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (a != b)))
    return rows[-1][-1]


@given(st.text("abc ", max_size=70), st.text("abc ", max_size=70))
def test_edits(first: str, second: str) -> None:
    assert edits(first, second) == table(first, second)


@settings(max_examples=60, deadline=None)
@given(CORPUS)
def test_chrf_is_sacrebleus(corpus: list[tuple[str, str]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = ([normalise(text) for text in side] for side in zip(*corpus, strict=True))
    expected = sacrebleu.CHRF().corpus_score(predictions, [references]).score
    assert value(corpus, "chrf") == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(CORPUS)
def test_bleu_is_sacrebleus(corpus: list[tuple[str, str]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = ([normalise(text) for text in side] for side in zip(*corpus, strict=True))
    expected = sacrebleu.BLEU().corpus_score(predictions, [references]).score
    assert value(corpus, "bleu") == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(CORPUS)
def test_rouge_is_the_reference_implementations(corpus: list[tuple[str, str]]) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    for name in ("rouge1", "rouge2", "rougeL"):
        theirs = scorer.RougeScorer([name])
        expected = [theirs.score(reference, prediction)[name].fmeasure for prediction, reference in corpus]
        assert value(corpus, name) == pytest.approx(sum(expected) / len(expected))


def test_error_rates() -> None:
    pairs = [("a cat", "a hat"), ("the  dog ran", "the dog"), ("", "x")]
    assert value(pairs, "character_error_rate") == pytest.approx((1 + 4 + 1) / (5 + 7 + 1))
    assert value(pairs, "word_error_rate") == pytest.approx((1 + 1 + 1) / (2 + 2 + 1))


def test_rows_without_an_answer_have_no_figures() -> None:
    silent = EvaluatedRow(1, "", 1.0, 1)
    found = with_scores(Evaluation("one", (silent,), 0.0, True, "", ("kl",)), ["chrf", "exact_match"])
    assert found.rows == (silent,) and found.measures == ("kl", "chrf")
    assert not MEASURES["chrf"].covers(silent)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_scores, "find_spec", lambda name: None)
    require_packages(["chrf", "exact_match", "loss"])
    with pytest.raises(MissingDependency, match="rouge_score") as error:
        require_packages(["rougeL"])
    assert error.value.fix == "pip install 'graftlm[metrics]'"


def test_a_recipe_knows_every_measure() -> None:
    assert {*get_args(Metric)} == {"loss", "exact_match", *SCORES}
    assert {*SCORES} <= {*MEASURES}
    assert all(MEASURES[name].figures == figures for name, figures in NEEDED.items())
    assert find_spec("sacrebleu") is None or value([("a b c d", "a b c d")], "bleu") == pytest.approx(100)
