"""A task that nobody named: told, said, kept in the plan, and the same when the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import SETTINGS, write_rows

from graftlm.core.config import read_yaml
from graftlm.core.errors import ConfigError, DataError
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.tune import tune


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"{n} + 1?", "chosen": f"It is {n + 1}.", "rejected": "No idea."} for n in range(70)]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "auto"
    return tune(pairs, model="sprout", out=out, overrides=[*SETTINGS, "train.max_steps=2"]).run


@pytest.mark.slow
def test_the_task_is_in_recipe_and_plan_with_its_reason(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert plan["task"] == "dpo" and "'chosen' and 'rejected'" in plan["task_why"]
    assert read_yaml(run / "recipe.yaml")["task"]["type"] == "dpo"


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_reason(run: Path, pairs: Path) -> None:
    before = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    tune(pairs, task="auto", out=run, resume=True)
    after = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert (after["task"], after["task_why"]) == (before["task"], before["task_why"])
    with pytest.raises(ConfigError, match="another recipe") as refused:
        tune(pairs, task="ipo", out=run, resume=True)
    assert any(problem.startswith("task.type: 'dpo' in the run") for problem in refused.value.problems)


@pytest.mark.slow
def test_an_evaluation_measures_what_the_run_was_judged_by(run: Path, pairs: Path) -> None:
    found = evaluate(run, data=pairs, limit=40)
    figures = found.as_dict()
    assert next(iter(figures["measures"])) == found.comparison.measures[0].name == "reward_accuracy"
    assert figures["measures"]["kl"]["before"][0] == 0.0
    assert found.lines[0].startswith("Reward accuracy: base ")
    with pytest.raises(DataError, match="hold no preferences"):
        evaluate(run, data=write_rows(run.parent / "other.jsonl", [{"text": "x"}] * 3))
