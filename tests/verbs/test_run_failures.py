"""What ends a run outside of training is in its log too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import SETTINGS

from graftlm.core.errors import TrainingError
from graftlm.core.events import read_events
from graftlm.core.files import RunLock
from graftlm.verbs.diagnose import diagnose
from graftlm.verbs.learner import Learner
from graftlm.verbs.tune import Tuning, tune


@pytest.fixture
def too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a stage runs out of memory."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Tuning, "_measure", fail)


def test_lack_of_memory_is_told_with_its_stage(too_small: None, sums: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="Out of memory on cpu: CUDA out of memory"):
        tune(sums, model="sprout", out=out, overrides=SETTINGS)
    last = read_events(out / "events.jsonl")[-1]
    assert (last["kind"], last["why"], last["phase"]) == ("end", "failed", "evaluate")
    found = diagnose(out)
    assert [one.title for one in found.findings if one.rule == "D06"] == ["Out of memory in evaluate"]
    assert not found.passed


def test_nothing_is_written_into_the_run_of_another_process(
    too_small: None, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    taken = RunLock._taken

    def held(lock: RunLock) -> RunLock:
        raise taken(lock, "process 1")

    monkeypatch.setattr(RunLock, "__enter__", held)
    with pytest.raises(TrainingError, match="Out of memory"):
        tune(sums, model="sprout", out=out, overrides=SETTINGS)
    assert not (out / "events.jsonl").exists()


def test_training_says_its_own_failures_once(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective fails in the second step, as it would in the forward pass of a long batch."""
    out, calls = tmp_path / "run", [0]
    objective = Learner.objective.fget
    assert objective is not None

    def failing(learner: Learner) -> object:
        inner = objective(learner)

        def call(*arguments: object) -> object:
            calls[0] += 1
            if calls[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return inner(*arguments)  # type: ignore[arg-type]

        return call

    monkeypatch.setattr(Learner, "objective", property(failing))
    with pytest.raises(TrainingError, match="Out of memory"):
        tune(sums, model="sprout", out=out, overrides=SETTINGS)
    ends = [event for event in read_events(out / "events.jsonl") if event["kind"] == "end"]
    assert [end["phase"] for end in ends] == ["forward"]
