"""Things a person should know once: not errors, never silent.

A notice is printed to standard error the first time it is given and remembered, so that a report
can list what a process said. Who shows progress bars or writes an event log puts its own sink.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Sink = Callable[[str], None]


def to_standard_error(text: str) -> None:
    """The sink that is active unless somebody puts another."""
    print(f"note: {text}", file=sys.stderr, flush=True)


_given: dict[str, None] = {}
_sinks: list[Sink] = [to_standard_error]


def notice(text: str) -> None:
    """Say `text` through the active sink, once per process."""
    if text not in _given:
        _given[text] = None
        _sinks[-1](text)


def collected() -> tuple[str, ...]:
    """Everything said so far, in order."""
    return tuple(_given)


def forget_notices() -> None:
    """Start afresh: a notice already given is said again."""
    _given.clear()


@contextmanager
def notices_to(sink: Sink) -> Iterator[None]:
    """Inside, notices go to `sink`.

    >>> forget_notices()
    >>> heard = []
    >>> with notices_to(heard.append):
    ...     notice("bfloat16 is slow here")
    ...     notice("bfloat16 is slow here")
    >>> heard
    ['bfloat16 is slow here']
    """
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.pop()
