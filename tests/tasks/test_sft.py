"""Answers of causal models judged by the measures that a recipe names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftlm.core.errors import ConfigError, MissingDependency
from graftlm.evaluation import text_scores
from graftlm.verbs.tune import tune

SETTINGS = (
    "data.max_length=64",
    "train.max_steps=1",
    "output.report_to=none",
    "eval.metrics=[word_error_rate, chrf]",
)


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} plus 1 is", "completion": f"the number {n + 1}"} for n in range(90)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_scores_by_name(sums: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.txt"
    known.write_text("Text that was known before.\n" * 40, encoding="utf-8")
    settings = [*SETTINGS, f"eval.known_path={known}"]
    found = tune(sums, model="sprout", task="sft", out=tmp_path / "run", overrides=settings)
    assert list(found.figures["measures"])[:2] == ["word_error_rate", "chrf"]
    before, low, high = found.figures["measures"]["chrf"]["before"]
    assert 0 <= low <= before <= high <= 100
    assert "word error rate" in found.verdict.lower()


def test_what_is_refused(sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="metrics"):
        tune(sums, model="sprout", out=tmp_path / "run", overrides=["eval.metrics=[rogue1]"])
    monkeypatch.setattr(text_scores, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="sacrebleu"):
        tune(sums, model="sprout", task="sft", out=tmp_path / "run", overrides=["eval.metrics=[bleu]"])
    assert not list((tmp_path / "run").glob("*.json")), "nothing was measured"
