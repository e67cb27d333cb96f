"""A C source of the kernels compiled for a test: for this machine, or for one that can do less."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from graftlm.core import compiling

FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
)


def compiled(source: Path, *more: str, folder: Path) -> Path:
    """The library of `source`, warnings being errors, with `more` flags; no threads.

    The test is skipped where there is no compiler, or none that knows the flags.
    """
    compiler = compiling.find_compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    library = folder / "library.so"
    command = [compiler, *FLAGS, *more, "-shared", str(source), "-o", str(library), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "command-line option" in done.stderr:
        pytest.skip(f"the compiler does not know one of {', '.join(more)}")
    assert done.returncode == 0, done.stderr
    return library
