"""The durable event log of a run: one JSON object per line, appended, never rewritten."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from graftlm.core.errors import CheckpointError
from graftlm.core.storage import storage_errors, write_all

_DURABLE = frozenset({"checkpoint", "end"})


class EventLog:
    """Appends events to a file; each line is visible to readers at once.

    A torn last line (its writer was killed) is removed when the log is opened, so that it cannot
    swallow the next event. Open it under the run's lock: two writers would do that to each other.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with EventLog(Path(folder) / "events.jsonl") as log:
    ...         log.append("notice", text="hello")
    ...     [event["text"] for event in read_events(Path(folder) / "events.jsonl")]
    ['hello']
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _drop_torn_line(self._descriptor)

    def append(self, kind: str, **fields: Any) -> None:
        """Write one event: `t` (unix time), `kind`, and `fields` (NaN and infinity become text).

        `checkpoint` and `end` are synced to the disk.

        Raises:
            StorageError: the disk is full; the log ends with its last whole line.
        """
        line = _line({"t": round(time.time(), 3), "kind": kind, **fields})
        size = os.fstat(self._descriptor).st_size
        with storage_errors(self.path, len(line)):
            try:
                write_all(self._descriptor, line)
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise
            if kind in _DURABLE:
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(event: dict[str, Any]) -> bytes:
    finite = {key: _finite(value) for key, value in event.items()}
    return (json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """Python's `NaN` is not JSON; a reader in another language must be able to read every line."""
    return repr(value) if isinstance(value, float) and value - value != 0 else value


def _drop_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        os.ftruncate(descriptor, end)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event in order of writing; a torn last line is left out.

    Raises:
        CheckpointError: a line in the middle is no event.
    """
    lines = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise CheckpointError(
                f"{path}, line {number}, is not an event.",
                meaning="The log was edited or damaged.",
                fix="Remove that line; checkpoints do not depend on the log.",
            )
        events.append(event)
    return events


def surviving_events(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what a later resume repeated: steps that ran after the checkpoint it started from.

    >>> log = [{"kind": "start", "start_step": 0}, {"kind": "step", "step": 1}, {"kind": "step", "step": 2},
    ...        {"kind": "start", "start_step": 1}, {"kind": "step", "step": 2, "again": True}]
    >>> [event.get("again", False) for event in surviving_events(log) if event["kind"] == "step"]
    [False, True]
    """
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "start":
            kept = [old for old in kept if (old.get("step") or 0) <= event["start_step"]]
        kept.append(event)
    return kept
