"""Stop requests: a signal sets a flag, the run ends itself at the next consistent boundary."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequests:
    """While entered, Ctrl-C, SIGTERM and SIGUSR1 ask for a stop; a second one ends the process at once.

    Nothing is saved inside a handler. Call the object to poll it. Outside the main thread Python
    allows no handlers: there, only `ask` can request a stop.

    >>> with StopRequests() as stop:
    ...     before = stop()
    ...     stop.ask(signal.SIGTERM)
    ...     before, stop(), stop.exit_code
    (False, True, 143)
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def ask(self, number: int = signal.SIGINT) -> None:
        """Request a stop as if signal `number` had come."""
        self.signal = int(number)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by that signal: 130 for Ctrl-C, 143 for SIGTERM; else 0."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)  # asked twice; published checkpoints are complete at any instant
        self.signal = number
        with contextlib.suppress(OSError):  # printing inside a handler may find the stream's lock taken
            os.write(2, _TEXT)


_TEXT = b"\nSaving, then stopping; press Ctrl-C again to stop at once.\n"
