"""Ctrl-C and SIGTERM: honoured in every phase, saved at a consistent boundary, told by the exit code."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from rig import contents

from graftlm.core.events import read_events
from graftlm.training.signals import StopRequests

SETTINGS: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
PHASES = {
    "before the first step": {"phase": "start", "calls": [1]},
    "forward": {"phase": "forward", "calls": [6]},
    "backward": {"phase": "backward", "calls": [6]},
    "after a step": {"phase": "step", "calls": [3]},
    "evaluation": {"phase": "evaluating", "calls": [2]},
    "last evaluation": {"phase": "evaluating", "calls": [5]},
    "after an evaluation": {"phase": "evaluate", "calls": [1]},
    "while saving": {"phase": "save", "calls": [1], "event": 9},
    "after a save": {"phase": "checkpoint", "calls": [1]},
}


@pytest.fixture(scope="module")
def reference(worker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference")
    assert worker(run, **SETTINGS)["code"] == 0
    return run


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("phase", PHASES)
def test_stop_in_each_phase(worker: Any, tmp_path: Path, reference: Path, phase: str, name: str) -> None:
    stopped = worker(tmp_path, **SETTINGS, signal_at={**PHASES[phase], "signal": name})
    assert stopped["code"] == 128 + getattr(signal, name)
    assert stopped["why"] == "interrupted" and not stopped["left"]
    log = [event["kind"] for event in read_events(tmp_path / "events.jsonl")]
    assert log[-2:] == ["interrupted", "end"]
    assert worker(tmp_path, **SETTINGS)["code"] == 0
    here, there = contents(tmp_path), contents(reference)
    assert here["trainable.safetensors"] == there["trainable.safetensors"]
    assert here["optimizer.safetensors"] == there["optimizer.safetensors"]


def test_an_interrupted_evaluation_is_repeated(worker: Any, tmp_path: Path, reference: Path) -> None:
    worker(tmp_path, **SETTINGS, signal_at={**PHASES["evaluation"], "signal": "SIGINT"})
    worker(tmp_path, **SETTINGS)
    evaluations = [_evaluations(tmp_path), _evaluations(reference)]
    assert evaluations[0] == evaluations[1] and [step for step, _ in evaluations[0]] == [2, 4]


def _evaluations(run: Path) -> list[tuple[int, float]]:
    events = read_events(run / "events.jsonl")
    return [(event["step"], event["loss"]) for event in events if event["kind"] == "evaluate"]


@pytest.mark.parametrize("phase", ["forward", "save", "evaluating"])
def test_a_second_signal_ends_the_process_at_once(
    worker: Any, tmp_path: Path, reference: Path, phase: str
) -> None:
    at = {
        "phase": phase,
        "calls": [3 if phase == "forward" else 1],
        "event": 9,
        "times": 2,
        "signal": "SIGINT",
    }
    stopped = worker(tmp_path, **SETTINGS, signal_at=at)
    assert stopped == {"code": 130}  # no report: it was gone at once
    assert worker(tmp_path, **SETTINGS)["code"] == 0
    assert contents(tmp_path) == contents(reference)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_only_asking_works() -> None:
    seen = []

    def inside() -> None:
        with StopRequests() as stop:
            stop.ask()
            seen.append(stop.exit_code)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [130]
