"""Compiled sources of this folder, opened for a process; or a notice says what runs in their place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from graftlm.core.compiling import build, is_switched_off
from graftlm.core.errors import GraftError
from graftlm.core.notices import notice


def opened(source: Path, load: Callable[[Path], ctypes.CDLL], without: str) -> ctypes.CDLL | None:
    """The library of `source` as `load` opens it; None where there cannot be any, or the user wants none.

    Args:
        source: a C file, as `build` takes it.
        load: opens a library and declares its functions.
        without: what a notice says first where compiling or loading failed.
    """
    if is_switched_off():
        return None
    try:
        return load(build(source, threads=hasattr(ctypes.CDLL(None), "GOMP_parallel")))
    except (GraftError, OSError) as error:
        parts = (
            [error.seen, *error.problems[:1], error.fix] if isinstance(error, GraftError) else [str(error)]
        )
        notice(" ".join([without, *parts]))
        return None
