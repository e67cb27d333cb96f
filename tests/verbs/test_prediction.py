"""What `graft tune` predicts of a run, what it says afterwards, and what it remembers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import SETTINGS, write_rows

from graftlm.core.cache import VARIABLE
from graftlm.evaluation.report import read_report
from graftlm.planning.history import read_records
from graftlm.verbs.prediction import FEWEST_STEPS, stored_prediction
from graftlm.verbs.tune import tune


def test_peaks_are_near_in_a_process_of_its_own(tmp_path: Path) -> None:
    """In this one memory of other tests would count."""
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}", "completion": f"{n}"} for n in range(80)])
    words = ["tune", str(data), "--model", "sprout", "--out", str(tmp_path / "run")]
    steps = ["--set", f"train.max_steps={FEWEST_STEPS}", "--set", "eval.before_after=false"]
    command = [sys.executable, "-m", "graftlm", *words, *steps]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, VARIABLE: str(tmp_path)}
    )
    assert (tmp_path / "run/report.json").is_file(), done.stderr
    found = read_report(tmp_path / "run/report.json").predictions
    assert found is not None
    assert all(one.actual and 0.3 < one.predicted / one.actual < 3 for one in found.peaks)


def test_a_run_is_predicted_compared_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    rows = [{"prompt": f"{n} and {n} make", "completion": f"{2 * n}, as was asked"} for n in range(80)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = [
        *(each for each in SETTINGS if "steps=" not in each),
        f"train.max_steps={FEWEST_STEPS}",
        "train.eval_steps=100",
    ]
    result = tune(data, model="sprout", out=tmp_path / "run", overrides=settings)
    assert "Plan   about" in capsys.readouterr().err

    plan = json.loads((result.run / "plan.json").read_text())["predicted"]
    stored = stored_prediction(result.run / "plan.json")
    assert stored is not None and json.loads(json.dumps(stored.as_dict())) == plan

    found = read_report(result.run / "report.json").predictions
    assert found is not None
    assert [one.name for one in found.peaks] == [phase.name for phase in stored.memory.phases]
    assert all(one.actual for one in found.peaks)
    assert {one.name for one in found.times} == {"load", "evaluate", "steps", "save", "verify"}
    assert all(one.actual is not None for one in found.times)
    assert "Predicted and actual" in (result.run / "report.html").read_text()

    (record,) = read_records()
    assert (record.base, record.method, record.storage) == ("sprout", "lora", "none")
    assert record.predicted_peak == stored.plain_peak and record.actual_step > 0


def test_a_plan_without_a_prediction_has_none(tmp_path: Path) -> None:
    assert stored_prediction(tmp_path / "plan.json") is None
    for content in ({}, {"predicted": {}}, {"predicted": {"memory": 3}}):
        (tmp_path / "plan.json").write_text(json.dumps(content))
        assert stored_prediction(tmp_path / "plan.json") is None
