"""Files and folders are complete or absent."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftlm.core.errors import CheckpointError, StorageError, UsageError
from graftlm.core.files import (
    MANIFEST,
    RunLock,
    json_text,
    remove_stale,
    require_new_directory,
    sha256_file,
    staged_directory,
    temporary_name,
    verify_manifest,
    write_atomic,
)
from graftlm.core.storage import require_space, storage_errors, write_new


def test_write_atomic_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    write_atomic(target, "grün")
    write_atomic(target, b"second")
    assert target.read_bytes() == b"second" and [path.name for path in target.parent.iterdir()] == [
        "file.txt"
    ]


def test_write_atomic_keeps_the_old_content_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    write_atomic(target, "old")
    monkeypatch.setattr(os, "write", _full)
    with pytest.raises(StorageError, match=r"4 bytes needed, [\d,]+ bytes free"):
        write_atomic(target, "new!")
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def _full(descriptor: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:7]))
    write_new(tmp_path / "f", [b"0123456789" * 3, b"", memoryview(b"end")])
    assert (tmp_path / "f").read_bytes() == b"0123456789" * 3 + b"end"


def test_chunks_of_any_size_arrive_in_order(tmp_path: Path) -> None:
    chunks = [b"a" * 10, b"b" * (1 << 20), b"c", b"d" * (3 << 20), b"e" * 900_000, b"f" * 900_000]
    write_new(tmp_path / "f", chunks)
    assert (tmp_path / "f").read_bytes() == b"".join(chunks)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_refusing_disk_is_a_storage_error(code: int) -> None:
    with pytest.raises(StorageError, match="Cannot write"), storage_errors(Path("x")):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass_through() -> None:
    with pytest.raises(FileNotFoundError), storage_errors(Path("x")):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_space_is_asked_before_writing(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(StorageError):
        require_space(tmp_path, 1 << 62)


def test_a_staged_directory_appears_whole_with_its_facts(tmp_path: Path) -> None:
    final, facts = tmp_path / "deep" / "final", {}
    with staged_directory(final, facts=facts) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").write_text("A")
        (staging / "b").write_text("B")
        facts["step"] = 3
        assert not final.exists()
    assert verify_manifest(final) == {"step": 3}
    assert json.loads((final / MANIFEST).read_text())["files"]["sub/a"] == {
        "bytes": 1,
        "sha256": sha256_file(final / "sub" / "a"),
    }
    assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_the_same_content_gives_the_same_manifest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with staged_directory(tmp_path / name) as staging:
            (staging / "a").write_text("A")
    assert (tmp_path / "one" / MANIFEST).read_bytes() == (tmp_path / "two" / MANIFEST).read_bytes()


def test_a_failed_body_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged_directory(tmp_path / "final") as staging:
        (staging / "a").write_text("A")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    require_new_directory(tmp_path / "empty")
    require_new_directory(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(UsageError, match="exists already"):
            require_new_directory(taken)
    with pytest.raises(UsageError), staged_directory(tmp_path):
        pass


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_flipped_bit_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    final = tmp_path / "sealed"
    if not final.exists():
        with staged_directory(final, facts={"step": 1, "name": "x"}) as staging:
            (staging / "a").write_bytes(bytes(range(64)))
            (staging / "b").write_text("B")
    path = final / data.draw(st.sampled_from([MANIFEST, MANIFEST, "a", "b"]))
    good = path.read_bytes()
    at = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[at // 8] ^= 1 << at % 8
    try:
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            verify_manifest(final)
    finally:
        path.write_bytes(good)
    verify_manifest(final)


def test_a_newer_schema_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json_text({"schema": 99, "files": {}, "facts": {}, "digest": ""}))
    with pytest.raises(CheckpointError, match="schema 99") as caught:
        verify_manifest(tmp_path)
    assert "Update" in caught.value.fix


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"schema": 1}', "\x00"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        verify_manifest(tmp_path)


def test_only_temporaries_of_dead_owners_are_removed(tmp_path: Path) -> None:
    mine = temporary_name(tmp_path / "mine")
    mine.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = tmp_path / f".gone.tmp-{dead.pid}-123-0123abcd"
    gone.mkdir()
    (gone / "f").write_text("x")
    reused = tmp_path / f".reused.tmp-{os.getpid()}-1-0123abcd"  # this pid, but another process of that pid
    reused.write_text("x")
    (tmp_path / ".other.tmp-notours").mkdir()
    removed = remove_stale(tmp_path)
    assert sorted(removed) == sorted(
        [gone.name, *([reused.name] if Path("/proc/self/stat").exists() else [])]
    )
    assert mine.is_dir() and (tmp_path / ".other.tmp-notours").is_dir()
    assert remove_stale(tmp_path / "absent") == []


def test_a_lock_excludes_other_threads_and_is_reentrant(tmp_path: Path) -> None:
    seen: list[str] = []

    def other() -> None:
        try:
            with RunLock(tmp_path / ".lock"):
                seen.append("entered")
        except CheckpointError as error:
            seen.append(error.seen)

    def ask() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with RunLock(tmp_path / ".lock"):
        with RunLock(tmp_path / ".lock"):
            ask()
        ask()
    ask()
    assert "another thread" in seen[0] and "another thread" in seen[1] and seen[2] == "entered"


def test_a_lock_excludes_other_processes_until_its_owner_dies(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from graftlm.core.files import RunLock\n"
        "with RunLock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(CheckpointError, match=f"in use by process {holder.pid}"),
            RunLock(tmp_path / ".lock"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with RunLock(tmp_path / ".lock"):
        pass
