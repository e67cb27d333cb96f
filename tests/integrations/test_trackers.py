"""TensorBoard files that its own reader reads; trackers that fail without harm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.notices import collected, forget_notices
from graftlm.integrations.trackers import SCALARS, TensorBoard, trackers
from graftlm.training.callbacks import Event

tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture(autouse=True)
def _fresh_notices() -> None:
    forget_notices()


def step(number: int, **fields: Any) -> Event:
    figures = {name: float(number) for name in SCALARS["step"]}
    return Event("step", {"step": number, **figures, **fields})


def said() -> list[str]:
    return [text for text in collected() if "TensorBoard" in text]


def test_its_own_reader_reads_it(tmp_path: Path) -> None:
    (writer,) = trackers(["tensorboard"], tmp_path)
    writer(Event("start", {"total_steps": 3}))
    for number in (1, 2, 3):
        writer(step(number))
    writer(Event("evaluate", {"step": 3, "loss": 0.5, "tokens": 10, "rows": 2}))
    writer(Event("end", {"step": 3, "seconds": 1.0, "why": "finished"}))
    reader = tensorboard.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    tags = set(reader.Tags()["scalars"])
    assert tags == {f"train/{name}" for name in SCALARS["step"]} | {"evaluate/loss"}
    assert [(item.step, item.value) for item in reader.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
    ]
    assert [(item.step, item.value) for item in reader.Scalars("evaluate/loss")] == [(3, 0.5)]
    assert said() == []


def test_nobody_asked() -> None:
    assert trackers([], Path("nowhere")) == []
    assert not Path("nowhere").exists()


def test_a_missing_package_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert trackers(["tensorboard"], tmp_path) == []
    assert trackers(["tensorboard"], tmp_path) == []
    assert len(said()) == 1
    assert "graftlm[track]" in said()[0]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    assert trackers(["tensorboard"], tmp_path) == []
    assert len(said()) == 1


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("closed"), RuntimeError("x")]
)
def test_a_writer_that_fails_harms_nothing(error: Exception, tmp_path: Path) -> None:
    """It is told once and left alone from then on."""
    writer = TensorBoard(tmp_path)
    calls = []

    class Broken:
        def add_scalar(self, *arguments: Any) -> None:
            calls.append(arguments)
            raise error

        def close(self) -> None:
            raise error

    writer._writer.close()
    writer._writer = Broken()
    for number in (1, 2, 3):
        writer(step(number))
    writer(Event("end", {"step": 3}))
    assert len(calls) == 1
    assert len(said()) == 1
    assert str(error) in said()[0]


def test_the_folder_vanishes_during_a_run(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path / "tensorboard")
    for number in range(1, 30):
        writer(step(number))
        for file in (tmp_path / "tensorboard").glob("*"):
            file.unlink()
    writer(Event("end", {"step": 30}))


def test_values_that_are_missing_are_left_out(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path)
    writer(Event("step", {"step": 1, "loss": float("nan")}))
    writer(Event("end", {"step": 1}))
    reader = tensorboard.EventAccumulator(str(tmp_path))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["train/loss"]
