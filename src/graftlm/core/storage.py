"""Disk primitives: full writes, durable directories, free space, and errors that name the bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from graftlm.core.errors import StorageError

_BUFFER = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENODEV, errno.ESTALE})


def free_bytes(path: Path) -> int:
    """Bytes this user may still write on the file system of `path` (which need not exist yet)."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_space(path: Path, needed: int) -> None:
    """Refuse before anything is written.

    Raises:
        StorageError: fewer than `needed` bytes are free where `path` lies or will lie.
    """
    free = free_bytes(path)
    if free < needed:
        raise _full(path, needed, free)


@contextlib.contextmanager
def storage_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full, read-only or vanished disk into a `StorageError` that names `path` and the bytes.

    Other `OSError`s (a missing file, say) pass through.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, needed, free_bytes(path)) from error
        if error.errno in _REFUSED:
            raise StorageError(
                f"Cannot write {path}: {error.strerror}.",
                meaning="The disk is read-only, gone, or not writable for this user.",
                fix="Make the folder writable or choose another one.",
            ) from error
        raise


def _full(path: Path, needed: int | None, free: int) -> StorageError:
    wanted = "an unknown number of" if needed is None else f"{needed:,}"
    return StorageError(
        f"No space for {path}: {wanted} bytes needed, {free:,} bytes free.",
        meaning="The disk or the quota is full; what was there before is intact.",
        fix="Free some space (old checkpoints, caches), then start again with --resume.",
    )


def write_new(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write a file that must not exist yet; small chunks go out together, durability is up to `sync`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
    try:
        pending = bytearray()
        for chunk in chunks:
            if len(pending) + memoryview(chunk).nbytes > _BUFFER:
                write_all(descriptor, pending)
                pending.clear()
            if memoryview(chunk).nbytes > _BUFFER:
                write_all(descriptor, chunk)
            else:
                pending += chunk
        write_all(descriptor, pending)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """`os.write` until every byte is out: one call may write less, 2 GiB at most."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def sync(path: Path) -> None:
    """Force a file, or the entries of a directory, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
