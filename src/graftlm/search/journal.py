"""The lock of a search's journal: held by the system, so that nobody who was killed holds it for ever."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

from graftlm.core.storage import storage_errors


class WaitingLock:
    """One process at a time, the others wait. The system frees it when its holder dies, however it dies.

    The thread that holds it may take it again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._descriptor, self._depth = -1, 0

    def __enter__(self) -> WaitingLock:
        import fcntl  # POSIX only

        self._mutex.acquire()
        if self._depth == 0:
            with storage_errors(self.path):
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            os.close(self._descriptor)  # the lock goes with the descriptor; the file stays
        self._mutex.release()


class JournalLock:
    """What Optuna's journal takes as its lock: whoever gets it also removes a torn last line."""

    def __init__(self, journal: Path) -> None:
        self._journal, self._lock = journal, WaitingLock(journal.with_suffix(".lock"))

    def acquire(self) -> bool:
        """Wait for it."""
        self._lock.__enter__()
        drop_torn_line(self._journal)
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.__exit__(None, None, None)


def drop_torn_line(path: Path) -> None:
    """Cut off what a killed writer left of its last line, which would spoil the next one."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with storage_errors(path):
            os.truncate(path, whole)
