"""Files and folders that are complete or absent: atomic writes, staged folders, manifests, locks.

A folder is published by one rename: staged beside its final place, every file synced, a
`MANIFEST.json` with the SHA-256 of each file written last. Whoever sees the final name sees all
of it; a killed writer leaves only a temporary sibling, which `remove_stale` takes away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from graftlm.core.errors import CheckpointError, UsageError
from graftlm.core.storage import storage_errors, sync, write_all, write_new

MANIFEST = "MANIFEST.json"
MANIFEST_SCHEMA = 1
_TEMPORARY = re.compile(r"^\..+\.tmp-(\d+)-(\d+)-[0-9a-f]{8}$")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `path` so that readers, also after a crash, see the old content or all of the new.

    Raises:
        StorageError: the disk is full or refuses; the old content is intact.
    """
    content = data.encode() if isinstance(data, str) else data
    with storage_errors(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            write_new(temporary, [content])
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_text(value: object) -> str:
    """The one JSON spelling used on disk: sorted, indented, no NaN, one newline at the end."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


@contextlib.contextmanager
def staged_directory(
    final: Path, *, facts: Mapping[str, Any] | None = None, needed: int | None = None
) -> Iterator[Path]:
    """Fill a temporary sibling of `final`; on leaving, seal it with a manifest and rename it there.

    Args:
        final: must not exist; a published folder is never overwritten.
        facts: JSON values for the manifest, read when the body is done (so it may still fill them).
        needed: bytes the body will write, for the message of a full disk.

    Raises:
        UsageError: `final` exists.
        StorageError: the disk is full or refuses; nothing is left behind.
    """
    require_new_directory(final)
    with storage_errors(final, needed):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(final)
        try:
            temporary.mkdir()
            yield temporary
            _seal(temporary, facts or {})
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(final.parent)


def _seal(folder: Path, facts: Mapping[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    manifest = _manifest(
        {path.relative_to(folder).as_posix(): _fingerprint(path) for path in files}, dict(facts)
    )
    write_new(folder / MANIFEST, [manifest.encode()])
    sync(folder / MANIFEST)
    for directory in [path for path in folder.rglob("*") if path.is_dir()]:
        sync(directory)
    sync(folder)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _manifest(files: dict[str, Any], facts: dict[str, Any]) -> str:
    body = {"schema": MANIFEST_SCHEMA, "files": files, "facts": facts}
    # The digest of its own body: a flipped byte in a fact is noticed like one in a tensor.
    return json_text({**body, "digest": hashlib.sha256(json_text(body).encode()).hexdigest()})


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check every byte of a sealed folder against its manifest; gives the manifest's `facts`.

    Raises:
        CheckpointError: the manifest or a file is missing, damaged or of an unknown schema.
    """
    content = _read_manifest(folder)
    problems = []
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif sha256_file(path) != expected["sha256"]:
            problems.append(f"{name}: the content changed (SHA-256 differs)")
    if problems:
        raise _damaged(folder, problems)
    facts: dict[str, Any] = content["facts"]
    return facts


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise _damaged(folder, [f"{MANIFEST}: missing"]) from None
    except ValueError:
        raise _damaged(folder, [f"{MANIFEST}: not readable"]) from None
    if isinstance(content, dict) and content.get("schema") != MANIFEST_SCHEMA:
        raise CheckpointError(
            f"{folder} has manifest schema {content.get('schema')!r}; this version reads {MANIFEST_SCHEMA}.",
            meaning="It was written by another version of Graft, or is damaged.",
            fix="Update Graft (pip install -U graftlm).",
        )
    if (
        not isinstance(content, dict)
        or content.keys() != {"schema", "files", "facts", "digest"}
        or text != _manifest(content["files"], content["facts"])
    ):
        raise _damaged(folder, [f"{MANIFEST}: the content changed"])
    return content


def _damaged(folder: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} is incomplete or damaged.",
        problems=problems,
        meaning="A write was cut short, or files were changed afterwards.",
        fix="Use another copy of it.",
    )


def require_new_directory(path: Path) -> None:
    """Refuse to write into something that is there already (an empty directory is fine).

    Raises:
        UsageError: `path` is a file or a directory with content.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UsageError(
            f"{path} exists already.",
            meaning="Graft never overwrites an output.",
            fix="Choose another folder, or remove this one.",
        )


def temporary_name(final: Path) -> Path:
    """A new hidden sibling of `final` that carries its owner: pid and the time that process began."""
    return final.with_name(
        f".{final.name}.tmp-{os.getpid()}-{_process_start(os.getpid())}-{secrets.token_hex(4)}"
    )


def remove_stale(folder: Path) -> list[str]:
    """Remove temporary siblings whose owner is dead, never those of a live one; gives their names."""
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _TEMPORARY.match(path.name)
        if match and not _is_alive(int(match[1]), int(match[2])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path.name)
    return removed


def _is_alive(pid: int, start: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives and belongs to somebody else
    return _process_start(pid) == start  # a reused pid has another start time


def _process_start(pid: int) -> int:
    """Kernel ticks at which `pid` began; 0 where the system does not tell (no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


class RunLock:
    """Only one process may work in a run folder: an OS lock, freed by the system if its owner dies.

    The thread that holds it may take it again (a verb locks the run, the training inside does too).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, RunLock(Path(folder) / ".lock"):
    ...     pass
    """

    _held: ClassVar[dict[Path, tuple[int, int, int]]] = {}  # path -> descriptor, thread, depth

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def __enter__(self) -> RunLock:
        thread = threading.get_ident()
        descriptor, owner, depth = self._held.get(self.path, (-1, thread, 0))
        if owner != thread:
            raise self._taken(f"another thread of process {os.getpid()}")
        self._held[self.path] = (self._acquire() if depth == 0 else descriptor, thread, depth + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        descriptor, thread, depth = self._held.pop(self.path)
        if depth > 1:
            self._held[self.path] = (descriptor, thread, depth - 1)
        else:
            os.close(descriptor)  # the lock goes with the descriptor; the file stays

    def _acquire(self) -> int:
        import fcntl  # POSIX only

        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise self._taken(owner or "another process") from None
        os.ftruncate(descriptor, 0)
        with storage_errors(self.path):
            write_all(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        return descriptor

    def _taken(self, owner: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path.parent} is in use by {owner}.",
            meaning="Two runs in one folder would overwrite each other's checkpoints.",
            fix="Wait for it to end, stop it, or choose another --out.",
        )
