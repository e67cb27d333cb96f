"""Weights that are used where they lie in a file, without being read as a whole.

The file is mapped into memory: a page of it is read when it is first touched, stays in the system's cache
while there is room, and counts as memory of this process until it is released.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graftlm.core.errors import ConfigError, ModelError
from graftlm.models.tensor_files import StoredTensor

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Of a private mapping the system otherwise sets aside as much memory as the file is long."""

_AT_ONCE = 2**17
"""Linux cuts one request to read ahead down to what it reads ahead by itself, which is no less than this."""

_POPULATE_READ = 22
"""`MADV_POPULATE_READ` of Linux 5.14: map a range at once, not page by page as it is touched."""


class MappedFile:
    """A file in memory, privately: a write would change this process's copy only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._populates = sys.platform == "linux"
        with path.open("rb") as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._known = self._state()
        self.memory = mmap.mmap(
            self._descriptor,
            self._known[0],
            flags=mmap.MAP_PRIVATE | _NO_RESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )

    def require_unchanged(self) -> None:
        """Touching what is no longer there would end the process without a word.

        Raises:
            ModelError: the file was written to or cut since it was mapped. (One that is merely deleted or
                replaced stays readable.)
        """
        if self._state() != self._known:
            raise self._changed()

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The values where they lie; no byte is read."""
        raw = torch.frombuffer(self.memory, dtype=torch.uint8, count=stored.nbytes, offset=stored.start)
        return raw.view(stored.dtype).view(stored.shape)

    def ask(self, start: int, stop: int) -> None:
        """Have these bytes read from the disk, in the background."""
        first, end = _outwards(start, stop)
        for begin in range(first, end, _AT_ONCE):
            self._advise(mmap.MADV_WILLNEED, begin, min(begin + _AT_ONCE, end))

    def bring(self, start: int, stop: int) -> None:
        """Make these bytes part of this process's memory; where the system has no call for that, they come
        when they are touched.

        Raises:
            ModelError: the file does not give them.
        """
        if self._populates:
            try:
                self._advise(_POPULATE_READ, *_outwards(start, stop))
            except OSError as error:
                if error.errno != errno.EINVAL:  # the file ends before them, or cannot be read
                    raise self._changed() from error
                self._populates = False  # Linux before 5.14

    def let_go(self, start: int, stop: int) -> None:
        """These bytes are no memory of this process any more; the system may keep them in its cache."""
        self._advise(mmap.MADV_DONTNEED, *_inwards(start, stop))

    def _advise(self, advice: int, start: int, stop: int) -> None:
        stop = min(stop, len(self.memory))
        if stop > start:
            self.memory.madvise(advice, start, stop - start)

    def _changed(self) -> ModelError:
        return ModelError(
            f"{self.path} was changed while it was in use, or cannot be read any more.",
            meaning="The weights that are computed with lie in that file.",
            fix="Restore the file and begin again; `--resume` goes on from the last checkpoint.",
        )

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class MappedTensor(StoredTensor):
    """A tensor that is not read but used where it lies."""

    values: Tensor

    def read(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class Range:
    """Bytes of one mapped file."""

    file: MappedFile
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def mapped(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[int, Range]]:
    """The same tensors, mapped, and where each lies by the address of its values.

    One that does not begin at a multiple of its element's size is read into memory when it is asked for.

    Raises:
        ConfigError: this system cannot release mapped memory.
    """
    if not hasattr(mmap.mmap, "madvise"):
        raise ConfigError(
            "placement='disk' needs a system that can release mapped memory (madvise): Linux or macOS.",
            fix="Leave placement out.",
        )
    files = {stored.file: MappedFile(stored.file) for stored in tensors.values()}
    found: dict[str, StoredTensor] = {}
    places: dict[int, Range] = {}
    for name, stored in tensors.items():
        if not stored.nbytes or stored.start % stored.dtype.itemsize:
            found[name] = stored
            continue
        file = files[stored.file]
        values = file.tensor(stored)
        found[name] = MappedTensor(stored.file, name, stored.dtype, stored.shape, stored.start, values)
        places[values.data_ptr()] = Range(file, stored.start, stored.start + stored.nbytes)
    return found, places


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as possible: what less than a page lies between becomes one."""
    found: list[Range] = []
    for each in sorted(ranges, key=lambda each: (str(each.file.path), each.start)):
        last = found[-1] if found else None
        if last is not None and last.file is each.file and each.start - last.stop < mmap.PAGESIZE:
            found[-1] = Range(last.file, last.start, max(last.stop, each.stop))
        else:
            found.append(each)
    return found


def outside(ranges: Iterable[Range], kept: Iterable[Range]) -> Iterator[Range]:
    """The bytes of `ranges` that are in none of `kept`."""
    held = joined(kept)
    for each in ranges:
        start = each.start
        for inner in held:
            if inner.file is each.file and start < inner.stop and inner.start < each.stop:
                yield Range(each.file, start, inner.start)
                start = inner.stop
        yield Range(each.file, start, each.stop)


def _outwards(start: int, stop: int) -> tuple[int, int]:
    return start // mmap.PAGESIZE * mmap.PAGESIZE, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE


def _inwards(start: int, stop: int) -> tuple[int, int]:
    return -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
