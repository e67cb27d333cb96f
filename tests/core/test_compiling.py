"""Code compiled at first use: kept for the user alone and checked before it is loaded."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftlm.core import compiling
from graftlm.core.environment import describe_environment
from graftlm.core.errors import GraftError

pytestmark = pytest.mark.skipif(compiling.find_compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiling.SWITCH, raising=False)
    return tmp_path / "cache" / "graft" / "kernels"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "seven.c"
    path.write_text("int seven(void) { return 7; }\n")
    return path


def test_compiles_once(source: Path, folder: Path) -> None:
    library = compiling.build(source, threads=False)
    assert ctypes.CDLL(str(library)).seven() == 7
    assert library.parent == folder and folder.stat().st_mode & 0o777 == 0o700
    written = library.stat().st_mtime_ns
    assert compiling.build(source, threads=False) == library
    assert library.stat().st_mtime_ns == written
    assert list(folder.iterdir()) == [library]


def test_another_source_is_another_library(source: Path) -> None:
    first = compiling.build(source, threads=False)
    source.write_text("int seven(void) { return 6 + 1 + 0; }\nint eight(void) { return 8; }\n")
    second = compiling.build(source, threads=False)
    assert first != second and first.exists()
    assert ctypes.CDLL(str(second)).eight() == 8


def test_what_a_source_includes_counts(source: Path) -> None:
    header = source.with_name("number.h")
    source.write_text('#include <stdint.h>\n#include "number.h"\nint seven(void) { return NUMBER; }\n')
    for number in (7, 8):
        header.write_text(f"#define NUMBER {number}\n")
        assert ctypes.CDLL(str(compiling.build(source, threads=False))).seven() == number


@pytest.mark.parametrize("damage", ["cut", "empty", "changed"])
def test_a_damaged_library_is_compiled_again(source: Path, damage: str) -> None:
    library = compiling.build(source, threads=False)
    good = library.read_bytes()
    bad = {"cut": good[: len(good) // 2], "empty": b"", "changed": good[:-1] + bytes([good[-1] ^ 1])}
    library.write_bytes(bad[damage])
    again = compiling.build(source, threads=False)
    assert again.read_bytes() == good
    assert ctypes.CDLL(str(again)).seven() == 7


def test_two_processes_may_be_first(source: Path, folder: Path) -> None:
    script = (
        "import ctypes, sys\nfrom pathlib import Path\nfrom graftlm.core.compiling import build\n"
        "print(ctypes.CDLL(str(build(Path(sys.argv[1]), threads=False))).seven())\n"
    )
    command = [sys.executable, "-c", script, str(source)]
    environment = {**os.environ, "PYTHONPATH": str(Path(compiling.__file__).parents[2])}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in started] == [b"7\n", b"7\n"]
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_a_folder_that_others_may_write_is_refused(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(GraftError, match="Other users may write") as refused:
        compiling.build(source, threads=False)
    assert "XDG_CACHE_HOME" in refused.value.fix
    assert compiling.state()[0] is False
    assert not list(folder.iterdir())


def test_a_folder_of_somebody_else_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.os, "getuid", lambda: 4711)
    with pytest.raises(GraftError, match="Other users may write"):
        compiling.build(source, threads=False)


def test_a_folder_that_cannot_be_made(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GraftError, match="No folder"):
        compiling.build(source, threads=False)


def test_an_error_of_the_compiler_is_shown(source: Path, folder: Path) -> None:
    source.write_text("int seven(void) { return eight; }\n")
    with pytest.raises(GraftError) as failed:
        compiling.build(source, threads=False)
    assert any("eight" in problem for problem in failed.value.problems)
    assert not list(folder.iterdir())


def test_the_environment_says_whether_and_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def path() -> tuple[bool, str]:
        (found,) = (p for p in describe_environment().fast_paths if p.name == "packed weights on CPU")
        return found.on, found.why

    assert path()[0] and str(compiling.find_compiler()) in path()[1]
    monkeypatch.setenv(compiling.SWITCH, "0")
    assert path() == (False, "GRAFT_NATIVE=0")
    monkeypatch.delenv(compiling.SWITCH)
    monkeypatch.setenv("PATH", str(tmp_path))
    on, why = path()
    assert not on and "Install one" in why
