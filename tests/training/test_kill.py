"""`kill -9` at every file event of a whole run with saves and rotation: nothing is ever lost or mixed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rig import contents

from graftlm.core.events import read_events, surviving_events
from graftlm.core.files import verify_manifest
from graftlm.training.checkpoint import latest, published

# Four steps, a save after each, one kept: every save but the first also removes an old checkpoint.
SETTINGS: dict[str, Any] = {"max_steps": 4, "save_steps": 1, "save_total_limit": 1, "eval_steps": 2}


@pytest.fixture(scope="module")
def reference(worker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference")
    assert worker(run, **SETTINGS)["code"] == 0
    return run


@pytest.fixture(scope="module")
def events(worker: Any, tmp_path_factory: pytest.TempPathFactory) -> int:
    count: int = worker(tmp_path_factory.mktemp("counted"), **SETTINGS, count_events=True)["events"]
    return count


def kill_and_resume(worker: Any, run: Path, event: int, expected: dict[str, bytes]) -> list[str]:
    """Everything that is wrong after a kill at file event number `event`; must be nothing."""
    killed = worker(run, **SETTINGS, kill_event=event)
    if killed["code"] != -9:
        return [f"event {event}: the run was not killed: {killed}"]
    steps = [e["step"] for e in read_events(run / "events.jsonl") if e["kind"] == "step"] if _log(run) else []
    done = max(steps, default=0)
    found = latest(run)  # raises if anything published does not verify
    at = int(found.path.name[5:]) if found.path else 0
    problems = [] if done - at <= 1 else [f"event {event}: {done} steps done, checkpoint of {at}"]
    problems += [f"event {event}: rejected {item}" for item in found.rejected]
    for path in published(run).values():  # also the one that was just being removed
        verify_manifest(path)
    resumed = worker(run, **SETTINGS)
    if resumed["code"] != 0 or resumed["left"] or contents(run) != expected:
        problems.append(f"event {event}: {resumed}")
        return problems
    log = surviving_events(read_events(run / "events.jsonl"))
    if [e["step"] for e in log if e["kind"] == "step"] != [1, 2, 3, 4]:
        problems.append(f"event {event}: the log lost or repeated a step")
    return problems


def _log(run: Path) -> bool:
    return (run / "events.jsonl").exists()


def check(worker: Any, folder: Path, reference: Path, points: list[int]) -> None:
    expected, failures = contents(reference), []
    for event in points:
        run = folder / f"killed-{event}"
        failures += kill_and_resume(worker, run, event, expected)
        shutil.rmtree(run, ignore_errors=True)
    print(f"\n{len(points)} kills, {len(failures)} failures")
    assert not failures, "\n".join(failures)


def test_killed_at_sampled_file_events(worker: Any, tmp_path: Path, reference: Path, events: int) -> None:
    check(worker, tmp_path, reference, list(range(1, events + 1, 13)))


@pytest.mark.slow
def test_killed_at_every_file_event(worker: Any, tmp_path: Path, reference: Path, events: int) -> None:
    check(worker, tmp_path, reference, list(range(1, events + 1)))


@pytest.mark.slow
def test_killed_twice(worker: Any, tmp_path: Path, reference: Path, events: int) -> None:
    """Killed, killed again while resuming, then left alone."""
    expected, failures = contents(reference), []
    for first in range(1, events + 1, 7):
        run = tmp_path / f"killed-{first}"
        worker(run, **SETTINGS, kill_event=first)
        worker(run, **SETTINGS, kill_event=first % 43 + 1)
        resumed = worker(run, **SETTINGS)
        if resumed["code"] != 0 or resumed["left"] or contents(run) != expected:
            failures.append((first, resumed))
        shutil.rmtree(run)
    print(f"\n{len(range(1, events + 1, 7))} double kills, {len(failures)} failures")
    assert not failures
