"""The examples run as they stand, and the recipe is what its comments say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from graftlm.training.recipe import DataSection, Recipe, load_recipe
from graftlm.verbs.tune import tune


@pytest.fixture(autouse=True)
def _importable(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`merge` starts a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(repository / "src"))


def test_every_example_is_tested(repository: Path) -> None:
    names = {path.name for path in (repository / "examples").iterdir() if path.is_file()}
    assert names == {"attach_train_merge.py", "several_adapters.py", "tune_and_look.py", "recipe.yaml"}


def test_attach_train_merge(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(repository / "examples" / "attach_train_merge.py"))
    assert example["main"](tmp_path) > 1.0
    assert "trainable params" in (out := capsys.readouterr().out)
    assert "Merged and verified" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_several_adapters(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(repository / "examples" / "several_adapters.py"))["main"]()
    out = capsys.readouterr().out
    assert "routed rows agree" in out
    assert "  base: The old boat" in out


def test_tune_and_look(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(repository / "examples" / "tune_and_look.py"))["main"](tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("True\n")
    assert "better" in out
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_recipe_shows_defaults(repository: Path) -> None:
    """Every value without a parenthesis in its comment is the default."""
    path = repository / "examples" / "recipe.yaml"
    recipe = load_recipe(path)
    least = Recipe(model=recipe.model, data=DataSection(path=recipe.data.path))
    text = path.read_text(encoding="utf-8").splitlines()
    said = {line.partition(":")[0].strip() for line in text if "#" in line and "(" in line.partition("#")[2]}
    for section in ("data", "method", "train", "eval", "output"):
        values, defaults = recipe.model_dump()[section], least.model_dump()[section]
        for key, value in values.items():
            if key not in said and f"{section}.{key}" != "train.gradient_accumulation_steps":
                assert value == defaults[key], f"{section}.{key}"


def test_the_recipe_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    short = [
        "train.max_steps=1",
        "eval.before_after=false",
        "eval.max_forgetting=null",
        "eval.metrics=[loss]",
    ]
    result = tune("examples/recipe.yaml", out=tmp_path / "run", overrides=[*short, "data.eval_fraction=0.03"])
    assert result.passed
