"""Proposals and their journal: repeatable, never twice the same, whole after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graftlm.search.journal import WaitingLock
from graftlm.search.space import Point, Space
from graftlm.search.study import JOURNAL, Known, Sampler, Study, propose

MIXED = Space.parse(
    {
        "method.type": ["lora", "ia3"],
        "train.weight_decay": {"low": 0.0, "high": 0.2, "step": 0.05},
        "when": {
            "method.type=lora": {
                "method.r": [4, 8, 16, 32],
                "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
                "method.target_modules": [["q_proj", "v_proj"], "all-linear"],
            },
            "method.type=ia3": {"train.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
        },
    }
)
SMALL = Space.parse({"method.r": [4, 8, 16], "method.bias": ["none", "all"]})


def value(space: Space, point: Point) -> float:
    """A quality with one best place."""
    fields = space.fields(point)
    rate = math.log10(float(fields.get("train.learning_rate", 1e-3)))
    return (
        (rate + 2.7) ** 2
        + 0.1 * (fields.get("method.type") == "ia3")
        + abs(fields.get("method.r", 8) - 16) / 50
    )


def searched(
    space: Space, sampler: Sampler, trials: int, *, seed: int = 0, objectives: int = 1
) -> list[Known]:
    known: list[Known] = []
    for _ in range(trials):
        found = propose(space, known, sampler=sampler, seed=seed, objectives=objectives, trials=trials)
        if found is None:
            break
        costs = (float(space.fields(found.point).get("method.r", 1)),) * (objectives - 1)
        known.append(Known(found.point, (value(space, found.point), *costs), found.memory))
    return known


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
@pytest.mark.parametrize("objectives", [1, 2])
def test_proposals_follow_the_seed_and_what_is_known(sampler: Sampler, objectives: int) -> None:
    first = searched(MIXED, sampler, 12, objectives=objectives)
    assert first == searched(MIXED, sampler, 12, objectives=objectives)
    resumed = propose(MIXED, first[:7], sampler=sampler, seed=0, objectives=objectives, trials=12)
    assert resumed is not None and resumed.point == first[7].point
    assert first != searched(MIXED, sampler, 12, seed=1, objectives=objectives)


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "grid"])
def test_no_point_is_proposed_twice_and_a_space_can_be_used_up(sampler: Sampler) -> None:
    found = searched(SMALL, sampler, 20)
    assert len(found) == SMALL.size == 6
    assert len({json.dumps(dict(one.point)) for one in found}) == 6


def test_tpe_finds_better_points_than_chance() -> None:
    def best(sampler: Sampler) -> float:
        runs = [searched(MIXED, sampler, 30, seed=seed) for seed in range(6)]
        return sum(min(value(MIXED, one.point) for one in run) for run in runs) / len(runs)

    assert best("tpe") < best("random")


def test_values_lie_in_their_domains() -> None:
    for one in searched(MIXED, "tpe", 20):
        fields = MIXED.fields(one.point)
        low, high = (1e-4, 1e-2) if fields["method.type"] == "lora" else (1e-3, 1e-1)
        assert low <= fields["train.learning_rate"] <= high
        assert fields.get("method.target_modules", "all-linear") in (["q_proj", "v_proj"], "all-linear")


def test_running_trials_are_known_without_values() -> None:
    known = searched(MIXED, "tpe", 8)
    running = [*known, Known(known[0].point | {"train.weight_decay": 0.05}, None)]
    found = propose(MIXED, running, sampler="tpe", seed=0, objectives=1, trials=20)
    assert found is not None and found.point not in [one.point for one in running]


def test_the_journal_gives_points_back_as_they_were(tmp_path: Path) -> None:
    study, points = Study(tmp_path, 2), [one.point for one in searched(MIXED, "random", 6)]
    assert [study.begin(point, MIXED) for point in points] == list(range(6))
    study.end(0, (1.0, 2.0), is_whole=True)
    study.end(1, (1.0, 2.0), is_whole=False)
    study.end(2, None, is_whole=False)
    study.end(0, (9.0, 9.0), is_whole=True)  # the first time counts
    again = Study(tmp_path, 2)
    assert again.points(MIXED) == points
    from optuna.trial import TrialState

    states = [trial.state for trial in again._trials]
    assert states[:4] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    assert again._trials[0].values == [1.0, 2.0]


@pytest.mark.parametrize("torn", [b'{"op_code": 4, "wor', b"{"])
def test_a_line_that_a_killed_process_left_half_written_is_dropped(tmp_path: Path, torn: bytes) -> None:
    study, points = Study(tmp_path, 1), [one.point for one in searched(SMALL, "random", 3)]
    study.begin(points[0], SMALL)
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(torn)
    study.begin(points[1], SMALL)  # while the first process lives
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(torn)
    again = Study(tmp_path, 1)
    again.begin(points[2], SMALL)
    assert Study(tmp_path, 1).points(SMALL) == points


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom graftlm.search.journal import WaitingLock\n"
        "with WaitingLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, env=environment
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline().strip() == b"held"
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    started = time.monotonic()
    with WaitingLock(tmp_path / "lock") as lock, lock:  # and it may be taken again inside
        assert time.monotonic() - started < 5
