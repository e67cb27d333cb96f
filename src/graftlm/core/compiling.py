"""C sources of the package, compiled once by the compiler of this machine and kept for the user.

A library lies in the user's cache folder under a name that holds a hash of its source, flags and target (so
another processor or compiler makes another one) and a hash of its own bytes (so a damaged one is made again).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from graftlm.core.errors import GraftError

SWITCH = "GRAFT_NATIVE"
"""Environment variable: 0 keeps plain torch where compiled code would run."""

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC")
_SECONDS = 120
_INCLUDE = re.compile(rb'^#include "([a-z0-9_]+\.h)"$', re.MULTILINE)


def is_switched_off() -> bool:
    """Whether the user wants no compiled code."""
    return os.environ.get(SWITCH) == "0"


def find_compiler() -> str | None:
    """Path of the system's C compiler."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def state() -> tuple[bool, str]:
    """Whether compiled code will run here, and why (not). Compiles nothing.

    >>> isinstance(state()[0], bool)
    True
    """
    if is_switched_off():
        return False, f"{SWITCH}=0"
    try:
        compiler, folder = _required_compiler(), cache_folder()
    except GraftError as error:
        return False, f"{error.seen} {error.fix}"
    return True, f"compiled at first use by {compiler}, kept in {folder}"


def build(source: Path, *, threads: bool) -> Path:
    """The shared library of `source`, compiled unless it is there already.

    Args:
        source: one C file. What it includes in quotes lies beside it.
        threads: OpenMP where the compiler is GCC. Its runtime is not linked in: the process must have
            loaded one for everybody, as torch does.

    Raises:
        GraftError: no compiler, no private cache folder, or the compiler failed.
    """
    compiler, folder = _required_compiler(), cache_folder()
    flags, target = _target(compiler)
    if threads and b"__clang__" not in target:
        flags = (*flags, "-fopenmp")
    content = _with_includes(source)
    key = _digest(b"\0".join([content, " ".join(flags).encode(), target]))
    name = f"{source.stem}-{key}"
    return _cached(folder, name) or _compile(compiler, flags, content, folder / name)


def cache_folder() -> Path:
    """The user's own folder for compiled code, made if need be.

    Raises:
        GraftError: it cannot be made, or others may write there.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    folder = root / "graft" / "kernels"
    fix = "Set XDG_CACHE_HOME to a folder of your own."
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        raise GraftError(f"No folder {folder} for compiled code: {error.strerror}.", fix=fix) from error
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise GraftError(
            f"Other users may write in {folder}.",
            meaning="Whoever can change a library there runs code as you.",
            fix=fix,
        )
    if not os.access(folder, os.W_OK):
        raise GraftError(f"{folder} is not writable.", fix=fix)
    return folder


def _required_compiler() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise GraftError("No C compiler (cc, gcc or clang).", fix="Install one: apt install gcc, say.")
    return compiler


def _target(compiler: str) -> tuple[tuple[str, ...], bytes]:
    """The flags that this compiler knows, and every macro it then defines: its version and the processor."""
    for extra in (("-march=native",), ()):
        flags = (*_FLAGS, *extra)
        asked = _run([compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
        if asked.returncode == 0:
            return flags, asked.stdout
    raise _failed(compiler, asked)


def _with_includes(source: Path) -> bytes:
    """The text of a C file, with those it includes in quotes in their places."""

    def text(found: re.Match[bytes]) -> bytes:
        return _with_includes(source.parent / os.fsdecode(found[1]))

    return _INCLUDE.sub(text, source.read_bytes())


def _cached(folder: Path, name: str) -> Path | None:
    for path in folder.glob(f"{name}-*.so"):
        if path.stem.removeprefix(f"{name}-") == _digest(path.read_bytes()):
            return path
    return None


def _compile(compiler: str, flags: tuple[str, ...], content: bytes, stem: Path) -> Path:
    """Two steps, so that a runtime for threads is not linked in. Published by one rename."""
    with tempfile.TemporaryDirectory(dir=stem.parent, prefix=".compiling-") as place:
        source, made, library = (Path(place, name) for name in ("source.c", "object.o", "library.so"))
        source.write_bytes(content)
        for command in (
            [compiler, *flags, "-c", str(source), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(library)],
        ):
            done = _run(command)
            if done.returncode:
                raise _failed(compiler, done)
        final = stem.with_name(f"{stem.name}-{_digest(library.read_bytes())}.so")
        os.replace(library, final)
    return final


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise GraftError(f"{command[0]} did not finish within {_SECONDS} s.") from error


def _failed(compiler: str, done: subprocess.CompletedProcess[bytes]) -> GraftError:
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return GraftError(
        f"{compiler} failed.",
        fix=f"Repair or update the compiler, or set {SWITCH}=0 to do without.",
        problems=said[:3],
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
