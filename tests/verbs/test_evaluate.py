"""`graft eval`: an adapter on rows it has not seen, row by row with its base or with another adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SETTINGS, Outcome, write_rows

from graftlm.core.errors import DataError, FormatError
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult


@pytest.fixture(scope="session")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(100, 140)]
    return write_rows(tmp_path_factory.mktemp("unseen") / "unseen.jsonl", rows)


def test_against_its_base(tuned: TuneResult, unseen: Path) -> None:
    result = evaluate(tuned.run, data=unseen)
    assert result.passed
    figures = result.as_dict()
    assert figures["rows"] == 40
    assert figures["loss"]["after"] < figures["loss"]["before"]
    assert figures["loss"]["difference"][2] < 0
    assert json.dumps(figures)
    assert result.lines[0].startswith("Loss: base ")


def test_the_adapter_alone_and_a_few_rows(tuned: TuneResult, unseen: Path) -> None:
    """A PEFT folder knows no recipe: its base is the one it names, its dtype that of the checkpoint."""
    result = evaluate(tuned.adapter, data=unseen, limit=31)
    assert result.as_dict()["rows"] == 31
    assert result.passed


def test_against_another_adapter(tuned: TuneResult, unseen: Path, sums: Path, tmp_path: Path) -> None:
    settings = ["train.max_steps=1", "eval.before_after=false"]
    weak = tune(sums, model="sprout", out=tmp_path / "weak", overrides=[*SETTINGS, *settings])
    worse = evaluate(weak.run, data=unseen, against=tuned.run)
    better = evaluate(tuned.run, data=unseen, against=weak.run)
    assert not worse.passed and better.passed
    one, other = better.as_dict()["loss"], worse.as_dict()["loss"]
    assert one["before"] == pytest.approx(other["after"], rel=1e-5)
    assert str(weak.run) in better.lines[0]
    with pytest.raises(FormatError):
        evaluate(tuned.run, data=unseen, against=tmp_path)


def test_the_same_adapter_is_no_better(tuned: TuneResult, unseen: Path) -> None:
    assert not evaluate(tuned.run, data=unseen, against=tuned.adapter).passed


def test_data_without_rows(tuned: TuneResult, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no rows"):
        evaluate(tuned.run, data=tmp_path / "empty.jsonl")


@pytest.mark.slow
def test_a_command_of_its_own(command: Callable[..., Outcome], tuned: TuneResult, unseen: Path) -> None:
    done = command("eval", tuned.run, "--data", unseen, "--json")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    assert done.json["outcome"] == "PASS"
