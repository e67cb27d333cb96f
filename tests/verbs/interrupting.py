"""Stop a run at a stage of its life."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graftlm.core.events import read_events
from graftlm.verbs.tune_result import TuneResult


def in_events(kind: str, step: int = 0) -> Callable[[Path], bool]:
    """Whether the log of a run has an event of that kind, at that step or later."""

    def seen(run: Path) -> bool:
        log = run / "events.jsonl"
        events = read_events(log) if log.exists() else []
        return any(event["kind"] == kind and event.get("step", 0) >= step for event in events)

    return seen


def is_written(name: str) -> Callable[[Path], bool]:
    return lambda run: (run / name).exists()


STAGES = {
    "while the base is measured": is_written("environment.json"),
    "while training": in_events("step", 3),
    "while the adapter is measured": in_events("end"),
}


def when(seen: Callable[[Path], bool], run: Path, act: Callable[[], None], over: threading.Event) -> None:
    """Wait for a stage of the run in `run`, then act once."""
    while not over.is_set():
        if seen(run):
            act()
            return
        time.sleep(0.002)


def interrupted(stage: str, run: Path, start: Callable[[], TuneResult]) -> str:
    """Start a run, send SIGINT to this very process at `stage`; gives what the run said."""
    over = threading.Event()
    act = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    watcher = threading.Thread(target=when, args=(STAGES[stage], run, act, over))
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            start()
    finally:
        over.set()
        watcher.join()
    return str(stop.value)
