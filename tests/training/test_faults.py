"""Faults in a run: bad numbers, full disks, damaged checkpoints, two processes in one folder."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import Parts, RowBatch, RowBatches, Settings, contents, make_model, make_rows, objective, trainable

from graftlm.core.errors import CheckpointError, StorageError, TrainingError
from graftlm.core.events import read_events
from graftlm.training.checkpoint import latest, published
from graftlm.training.loop import TrainResult, train
from graftlm.training.restore import restore

SETTINGS: dict[str, Any] = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}


@pytest.fixture(scope="module")
def reference(worker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference")
    assert worker(run, **SETTINGS)["code"] == 0
    return run


def train_here(run: Path, loss: Any = objective, **settings: Any) -> TrainResult:
    model = make_model()
    batches = RowBatches(make_rows(7))
    return train(model, loss, batches, trainable(model), Settings(**{**SETTINGS, **settings}), run=run)


def poisoned(*bad_rows: int) -> Any:
    """The objective, with a loss that is NaN for batches with one of these rows."""

    def loss(model: Any, batch: RowBatch) -> Parts:
        parts = objective(model, batch)
        return (
            Parts(parts.loss_sum * math.nan, parts.target_tokens)
            if set(bad_rows) & set(batch.rows)
            else parts
        )

    return loss


def test_one_bad_batch_is_skipped_and_reported(tmp_path: Path) -> None:
    result = train_here(tmp_path, poisoned(3), max_steps=4)
    assert result.why == "finished" and result.skipped == 2  # once per epoch of two steps
    skipped = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "skipped"]
    assert all(3 in event["rows"] and "not finite" in event["why"] for event in skipped)
    tensors = [path for path in published(tmp_path).values()]
    assert tensors and math.isfinite(result.train_loss or math.nan)


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    calls = [0]

    def loss(model: Any, batch: RowBatch) -> Parts:
        calls[0] += 1
        parts = objective(model, batch)
        return Parts(parts.loss_sum * (math.inf if calls[0] > 4 else 1.0), parts.target_tokens)

    with pytest.raises(TrainingError, match="3 steps in a row") as caught:
        train_here(tmp_path, loss, max_steps=8)
    assert sum(problem.startswith("rows ") for problem in caught.value.problems) == 3
    assert any("lora_A" in problem for problem in caught.value.problems)
    assert read_events(tmp_path / "events.jsonl")[-1]["why"] == "failed"
    good = latest(tmp_path).path
    assert good is not None
    model = make_model()
    parameters = trainable(model)
    from safetensors.torch import load_file

    assert all(bool(tensor.isfinite().all()) for tensor in load_file(good / "trainable.safetensors").values())
    assert load_file(good / "trainable.safetensors").keys() == parameters.keys()


def test_all_labels_masked_trains_nothing_and_says_so(tmp_path: Path) -> None:
    class Masked(RowBatches):
        def batch(self, epoch: int, index: int) -> RowBatch:
            made = super().batch(epoch, index)
            return RowBatch(made.inputs, torch.full_like(made.labels, -100), 0, made.real_tokens, made.rows)

    model = make_model()
    before = {name: item.detach().clone() for name, item in trainable(model).items()}
    result = train(
        model, objective, Masked(make_rows(7)), trainable(model), Settings(**SETTINGS), run=tmp_path
    )
    assert (result.skipped, result.train_loss) == (4, None)
    assert all(torch.equal(item, before[name]) for name, item in trainable(model).items())
    skipped = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "skipped"]
    assert len(skipped) == 4 and "no target token" in skipped[0]["why"]


def test_disk_full_at_any_byte(worker: Any, tmp_path: Path, reference: Path) -> None:
    expected = contents(reference)
    one = sum(len(data) for data in expected.values())
    draw = random.Random(4)
    points = [0, 1, *(draw.randrange(3 * one) for _ in range(18))]
    for room in points:
        run = tmp_path / f"room-{room}"
        full = worker(run, **SETTINGS, room=room)
        assert full["code"] == 1 and full["error"] == "StorageError", full
        assert "bytes needed" in full["seen"] and "bytes free" in full["seen"]
        assert not full["left"] and not latest(run).rejected
        assert worker(run, **SETTINGS)["code"] == 0
        assert contents(run) == expected
    print(f"\n{len(points)} full disks, 0 damaged checkpoints")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(worker: Any, tmp_path: Path, reference: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        ballast = tmp_path / "ballast"
        worker(tmp_path / "run", **SETTINGS, signal_at={"phase": "step", "calls": [2], "signal": "SIGTERM"})
        ballast.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 20000))
        full = worker(tmp_path / "run", **SETTINGS)
        assert full["error"] == "StorageError" and "bytes free" in full["seen"]
        ballast.unlink()
        assert worker(tmp_path / "run", **SETTINGS)["code"] == 0
        assert contents(tmp_path / "run") == contents(reference)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one checkpoint folder in one random way; says how."""
    path = draw.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    match draw.choice(["flip", "truncate", "delete", "swap", "zero"]):
        case "flip":
            at = draw.randrange(len(data))
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
            return f"flipped a bit of byte {at} of {path.name}"
        case "truncate":
            size = draw.randrange(len(data))
            path.write_bytes(data[:size])
            return f"cut {path.name} to {size}"
        case "delete":
            path.unlink()
            return f"deleted {path.name}"
        case "swap":
            other = draw.choice([item for item in sorted(folder.iterdir()) if item != path])
            content = other.read_bytes()
            other.write_bytes(data)
            path.write_bytes(content)
            return f"swapped {path.name} and {other.name}"
        case _:
            start = next(i for i in range(draw.randrange(len(data) - 1), -1, -1) if data[i])
            path.write_bytes(data[:start] + bytes(min(4096, len(data) - start)) + data[start + 4096 :])
            return f"zeroed a page of {path.name} at {start}"


def test_every_damage_is_found_before_anything_changes(tmp_path: Path, reference: Path) -> None:
    draw, missed, places = random.Random(8), [], 200
    model = make_model()
    parameters = trainable(model)
    before = {name: item.detach().clone() for name, item in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values())
    for number in range(places):
        run = tmp_path / str(number)
        shutil.copytree(reference, run)
        newest, older = list(published(run).values())[::-1]
        how = damage(newest, draw)
        found = latest(run)
        if (
            found.path != older
            or [item.path for item in found.rejected] != [newest]
            or not found.rejected[0].why
        ):
            missed.append(how)
        with pytest.raises(CheckpointError):
            restore(newest, parameters=parameters, optimizer=optimizer, identity={})
        shutil.rmtree(run)
    print(f"\n{places} damaged checkpoints, {len(missed)} missed")
    assert not missed
    assert not optimizer.state and all(torch.equal(parameters[name], before[name]) for name in before)


def test_a_damaged_checkpoint_is_passed_over_aloud(worker: Any, tmp_path: Path, reference: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    run = tmp_path / "run"
    newest = list(published(run).values())[-1]
    (newest / "state.json").unlink()
    resumed = worker(run, **SETTINGS)
    assert resumed["code"] == 0 and contents(run) == contents(reference)
    said = [event["text"] for event in read_events(run / "events.jsonl") if event["kind"] == "notice"]
    assert any("Rejected step-000004: state.json: missing" in text for text in said)
    assert len(list((run / "checkpoints").glob("step-000004.rejected-*"))) == 1


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(
    worker: Any, tmp_path: Path, reference: Path
) -> None:
    shutil.copytree(reference, tmp_path / "run")
    for path in published(tmp_path / "run").values():
        (path / "MANIFEST.json").unlink()
    refused = worker(tmp_path / "run", **SETTINGS)
    assert refused["error"] == "CheckpointError" and len(refused["problems"]) == 2
    assert len(published(tmp_path / "run")) == 2


def test_two_processes_cannot_share_a_run_folder(tmp_path: Path) -> None:
    held = tmp_path / "held"
    code = (
        "import sys, time, pathlib; from graftlm.core.files import RunLock\n"
        "with RunLock(pathlib.Path(sys.argv[1])): pathlib.Path(sys.argv[2]).touch(); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run" / ".lock"), str(held)], env=environment
    )
    try:
        for _ in range(300):
            if held.exists():
                break
            time.sleep(0.1)
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on"):
            train_here(tmp_path / "run")
        assert not (tmp_path / "run" / "events.jsonl").exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
    assert train_here(tmp_path / "run").why == "finished"  # a dead owner holds nothing


def test_no_room_for_a_checkpoint_is_known_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="1,000 bytes free"):
        train_here(tmp_path)
    assert not published(tmp_path)
