"""A stopped and resumed run ends exactly as one that was never stopped: every byte of its state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rig import contents

from graftlm.core.events import read_events, surviving_events

# 7 rows in batches of 2: 4 micro-batches, 2 windows of 2, an epoch; 3 epochs, 6 steps.
SETTINGS: dict[str, Any] = {"num_train_epochs": 3, "save_steps": None}
SIGTERM = {"signal": "SIGTERM"}


@pytest.fixture(scope="module")
def uninterrupted(worker: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("uninterrupted")
    report = worker(run, **SETTINGS)
    assert report["code"] == 0 and report["step"] == 6, report
    return run, report


STOPS = {
    "before the first update": ({"phase": "forward", "calls": [1]}, 0),
    "mid-accumulation": ({"phase": "forward", "calls": [4]}, 1),
    "mid-epoch": ({"phase": "step", "calls": [1]}, 1),
    "epoch boundary": ({"phase": "step", "calls": [2]}, 2),
    "second epoch, mid-accumulation": ({"phase": "backward", "calls": [7]}, 3),
    "last window": ({"phase": "forward", "calls": [12]}, 5),
}


@pytest.mark.parametrize("stop", STOPS)
def test_resume_is_bit_exact(
    worker: Any, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]], stop: str
) -> None:
    reference, whole = uninterrupted
    where, step = STOPS[stop]
    first = worker(tmp_path, **SETTINGS, signal_at={**where, **SIGTERM})
    assert (first["code"], first["why"], first["step"]) == (143, "interrupted", step)
    second = worker(tmp_path, **SETTINGS)
    assert (second["code"], second["why"], second["step"]) == (0, "finished", 6)
    assert contents(tmp_path) == contents(reference)
    # Every row once, in the same order; the window that was dropped is served again.
    used = [tuple(rows) for rows in whole["served"]]
    assert [tuple(rows) for rows in second["served"]] == used[2 * step :]


def test_resume_in_a_fresh_interpreter(
    worker: Any, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    worker(tmp_path, **SETTINGS, signal_at={"phase": "forward", "calls": [6], **SIGTERM})
    job = json.dumps({**SETTINGS, "run": str(tmp_path)})
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), "run", job]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)
    assert contents(tmp_path) == contents(uninterrupted[0])


def test_five_stops_leave_no_trace(
    worker: Any, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    for call in (2, 1, 4, 3, 2):
        worker(tmp_path, **SETTINGS, signal_at={"phase": "forward", "calls": [call], **SIGTERM})
    assert worker(tmp_path, **SETTINGS)["code"] == 0
    assert contents(tmp_path) == contents(uninterrupted[0])
    steps = [
        e["step"] for e in surviving_events(read_events(tmp_path / "events.jsonl")) if e["kind"] == "step"
    ]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_evaluation_and_how_often_to_save_do_not_change_the_result(
    worker: Any, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    evaluated = worker(tmp_path, **{**SETTINGS, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1})
    assert evaluated["code"] == 0
    here, there = contents(tmp_path), contents(uninterrupted[0])
    assert here["trainable.safetensors"] == there["trainable.safetensors"]
    assert here["optimizer.safetensors"] == there["optimizer.safetensors"]


def test_a_moved_run_resumes(worker: Any, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    worker(before, **SETTINGS, signal_at={"phase": "forward", "calls": [5], **SIGTERM})
    before.rename(after)
    assert worker(after, **SETTINGS)["code"] == 0
    assert contents(after) == contents(uninterrupted[0])
    assert str(tmp_path) not in (after / "events.jsonl").read_text()
    assert not any(str(tmp_path).encode() in data for data in contents(after).values())


def test_a_finished_run_resumes_to_nothing(worker: Any, tmp_path: Path) -> None:
    assert worker(tmp_path, max_steps=2)["code"] == 0
    before = contents(tmp_path)
    again = worker(tmp_path, max_steps=2)
    assert (again["why"], again["step"], again["served"]) == ("finished", 2, [])
    assert contents(tmp_path) == before


CHANGED = {
    "learning_rate": ({"learning_rate": 1e-3}, "learning_rate: was 0.005, is 0.001"),
    "data": ({"data_seed": 12}, "data: was"),
    "steps": ({"num_train_epochs": 4}, "total_steps: was 6, is 8"),
    "accumulation": ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: was 2, is 1"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_changed_data_or_settings_are_refused(worker: Any, tmp_path: Path, what: str) -> None:
    change, expected = CHANGED[what]
    worker(tmp_path, **SETTINGS, signal_at={"phase": "forward", "calls": [5], **SIGTERM})
    before = contents(tmp_path)
    refused = worker(tmp_path, **{**SETTINGS, **change})
    assert refused["code"] == 1 and refused["error"] == "CheckpointError"
    assert any(expected in problem for problem in refused["problems"])
    assert contents(tmp_path) == before


def test_starting_afresh_over_checkpoints_is_refused(worker: Any, tmp_path: Path) -> None:
    worker(tmp_path, max_steps=2)
    refused = worker(tmp_path, max_steps=2, resume="never")
    assert refused["error"] == "CheckpointError" and "--resume" in refused["fix"]
