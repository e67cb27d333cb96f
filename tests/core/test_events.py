"""The event log: whole lines only, whatever happens to the writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from graftlm.core.errors import CheckpointError, StorageError
from graftlm.core.events import EventLog, read_events


def test_events_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    with EventLog(path) as log:
        log.append("start", run="ü", rows=(1, 2))
        assert len(read_events(path)) == 1  # visible at once
        log.append("step", loss=float("nan"), norm=float("inf"), extra={"a": 1})
        log.append("end", why="finished")
    events = read_events(path)
    assert [event["kind"] for event in events] == ["start", "step", "end"]
    assert events[0]["run"] == "ü" and events[0]["rows"] == [1, 2] and events[0]["t"] > 1e9
    assert (events[1]["loss"], events[1]["norm"]) == ("nan", "inf")


@pytest.mark.parametrize("torn", ['{"kind": "st', "x" * 200_000, "\n"[:0]])
def test_a_torn_last_line_is_ignored_and_then_removed(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("step", step=1)
    with path.open("a") as stream:
        stream.write(torn)
    assert [event["step"] for event in read_events(path)] == [1]
    with EventLog(path) as log:
        log.append("step", step=2)
    assert [event["step"] for event in read_events(path)] == [1, 2]


def test_a_log_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"y" * 100_000)
    EventLog(path).close()
    assert path.read_bytes() == b""


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "a"}\nbroken\n{"kind": "b"}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_events(path)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, bytes(data)[: len(data) // 2])

    with EventLog(path) as log:
        log.append("step", step=1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(StorageError):
                log.append("step", step=2, text="long enough to be written in two halves")
        log.append("step", step=3)
    assert [event["step"] for event in read_events(path)] == [1, 3]
    log.close()  # twice is fine
