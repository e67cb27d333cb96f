"""A failure of any stage of a run is in its event log, where `graft diagnose` finds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from graftlm.core.errors import CheckpointError, GraftError, StorageError
from graftlm.core.events import EventLog, read_events
from graftlm.core.files import RunLock
from graftlm.training.loop import LOCK
from graftlm.training.memory_phases import MemoryPhases
from graftlm.training.out_of_memory import memory_errors
from graftlm.verbs.references import RECIPE
from graftlm.verbs.run_folder import RunFolder


@contextmanager
def failures_noted(folder: RunFolder, memory: MemoryPhases) -> Iterator[None]:
    """Inside, lack of memory is an error in three parts, and what fails outside of training is logged too."""
    try:
        with memory_errors(memory.device):
            yield
    except GraftError as error:
        # Not where nothing was written yet, where another process has the run, or where the disk is full.
        if (folder.path / RECIPE).is_file():
            with suppress(CheckpointError, StorageError):
                _note(folder, error, memory.failed_in)
        raise


def _note(folder: RunFolder, error: GraftError, phase: str) -> None:
    with RunLock(folder.path / LOCK):
        events = read_events(folder.events) if folder.events.is_file() else []
        said = error.as_dict()
        if events and events[-1].get("error") == said:
            return  # training has said it
        step = max((int(event.get("step") or 0) for event in events), default=0)
        with EventLog(folder.events) as log:
            log.append("end", step=step, seconds=0.0, why="failed", error=said, phase=phase)
