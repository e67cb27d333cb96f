"""Cases of tasks: valid recipes, rows that are what a run said, a page that is what the rows say."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any

import pytest
import task_runs
import tasks_page
from harness import results
from harness.task_case import TaskCase, rows_of

from graftlm.core.config import build
from graftlm.training.recipe import Recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted((BENCHMARKS / "tasks").glob("*.py"))
FIGURES: dict[str, Any] = {
    "steps": 20,
    "seconds": 3.21,
    "peak_memory_bytes": 1000,
    "after": {"held_out_rows": 40},
    "measures": {
        "accuracy": {"before": [0.5, 0.4, 0.6], "after": [0.9, 0.8, 0.95]},
        "loss": {"before": None, "after": [0.3, 0.2, 0.4]},
    },
}


def cases_of(path: Path, folder: Path) -> list[TaskCase]:
    """The cases of a file, which may need a folder for data that it makes."""
    spec = importlib.util.spec_from_file_location(f"tasks_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[TaskCase] = module.CASES if hasattr(module, "CASES") else module.cases(folder)
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_every_case_is_a_valid_recipe(path: Path, shared: Path, tmp_path: Path) -> None:
    cases = cases_of(path, tmp_path)
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)
    seeds: dict[tuple[str, ...], set[int]] = {}
    for case in cases:
        recipe = build(Recipe, case.as_recipe(), source=" ".join(case.key))
        assert recipe.train.seed == case.seed
        seeds.setdefault(case.key[:-1], set()).add(case.seed)
    assert max(map(len, seeds.values())) >= 3


def test_a_run_gives_a_row_for_each_measure() -> None:
    case = TaskCase("classification", "base", "data.csv", "lora", seed=43)
    accuracy, loss = rows_of(case, FIGURES, {"trainable": 1234})
    assert (accuracy["measure"], accuracy["before"], accuracy["after_high"]) == ("accuracy", "0.5", "0.95")
    assert (loss["before"], loss["after"], loss["seed"], loss["trainable"]) == ("", "0.3", 43, 1234)


def test_a_table_holds_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    values = (0.8, 0.9, 1.0)
    for seed, value in zip(task_runs.SEEDS, values, strict=True):
        figures = {**FIGURES, "measures": {"accuracy": {"before": [0.5, 0.4, 0.6], "after": [value] * 3}}}
        case = TaskCase("classification", "base", "data.csv", "lora", seed=seed)
        results.append(task_runs.results_file("x"), rows_of(case, figures, {"trainable": 1234}))
    half = 4.303 * statistics.stdev(values) / 3**0.5
    page = tasks_page.filled("# Page\n")
    after = f"0.900 ({0.9 - half:.3f} to {0.9 + half:.3f})"
    assert f"| lora | 1,234 | accuracy | 0.500 (0.500 to 0.500) | {after} | 3 |" in page
    assert tasks_page.filled(page) == page  # and a second time changes nothing
    assert "not measured" in tasks_page.filled("<!-- results: y -->\n<!-- end -->\n")


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    run: list[int] = []

    def one(case: TaskCase, *, threads: int | None = None) -> list[dict[str, Any]]:
        run.append(case.seed)
        return rows_of(case, FIGURES, {"trainable": 1})

    monkeypatch.setattr(task_runs, "run_case", one)
    cases = task_runs.with_seeds([TaskCase("sft", "base", "data", "lora")])
    task_runs.run_cases("x", cases[:1])
    task_runs.run_cases("x", cases)
    assert run == [42, 43, 44]
