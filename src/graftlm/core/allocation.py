"""Memory that was freed stays with the process for a while, where the C library would return it at once.

A training step frees and takes the same large blocks again and again. The C library of Linux maps each of
them afresh: the system clears its pages and hands them out one at a time, at every step.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_USUAL_TRIM, _USUAL_MMAP = 64 * 2**20, 32 * 2**20  # where it goes by itself, once large blocks were freed
_ALL = 2**31 - 1
_keeping: list[bool] = []
"""One entry for each `freed_memory_kept` that is entered now."""


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Inside, large blocks are reused and nothing is returned to the system; at the end all that is free is.

    Yields whether this C library can be told (glibc); elsewhere nothing changes. Not for two threads at a
    time: the setting is the process's.

    >>> with freed_memory_kept() as kept:
    ...     isinstance(kept, bool)
    True
    """
    library = _glibc()
    if library is None:
        yield False
        return
    library.mallopt(_MMAP_THRESHOLD, _ALL) or library.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)  # before 2.35
    library.mallopt(_TRIM_THRESHOLD, _ALL)
    _keeping.append(True)
    try:
        yield True
    finally:
        _keeping.pop()
        library.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        library.malloc_trim(0)


def return_freed() -> None:
    """Give what is free to the system, also what lies between blocks in use; not inside `freed_memory_kept`.

    Blocks of many sizes leave holes that the next ones do not fit into: a process may come to hold several
    times what it uses. For the end of a stage; it costs milliseconds.

    >>> return_freed()
    """
    library = _glibc()
    if library is not None and not _keeping:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
