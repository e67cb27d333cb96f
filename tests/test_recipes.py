"""Every recipe of `examples/recipes` runs, from the repository's root, as its first lines say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftlm.models.sprout import SPROUT
from graftlm.objectives.settings import AUTO, SETTINGS
from graftlm.training.recipe import load_recipe
from graftlm.verbs.tune import tune

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
STAND_INS = {"google-t5/t5-small": "g2p-bart-us", "FacebookAI/roberta-base": "roberta-tiny-en"}
"""Bases of recipes that have to be fetched, and the small real models that stand for them here."""
RELATIVES = {"ipo": "dpo", "simpo": "dpo", "orpo": "dpo", "kto": "dpo", "rloo": "grpo", "ppo": "grpo"}
"""Tasks whose recipe is that of another one with one word changed, as its first lines say."""


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_says_how_it_is_started(path: Path) -> None:
    first = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"graft tune {path.relative_to(ROOT).as_posix()}" in line for line in first)
    recipe = load_recipe(path)
    assert recipe.task.type != AUTO
    assert recipe.model.name == SPROUT or recipe.model.name in STAND_INS


def test_every_task_has_a_recipe() -> None:
    shown = {load_recipe(path).task.type for path in RECIPES}
    assert {RELATIVES.get(name, name) for name in SETTINGS if name != AUTO} <= shown


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(ROOT)  # where its paths begin
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    overrides = ["train.max_steps=2", "output.report_to=none"]
    name = load_recipe(path).model.name
    if name in STAND_INS:
        overrides.append(f"model.name={request.getfixturevalue('shared') / 'models' / STAND_INS[name]}")
    result = tune(path, out=tmp_path / "run", overrides=overrides)
    assert result.report.is_file()
    assert result.figures["steps"] == 2
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert plan["task"] == load_recipe(path).task.type
