"""Tensors in safetensors files, read one at a time and only when asked for.

Files are read, not mapped into memory: the pages of a mapped file count as memory of the process, so that a
checkpoint of 16 GB would seem to need 16 GB however little of it is used at a time.
"""

from __future__ import annotations

import io
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from graftlm.core.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats by the names that safetensors gives them."""

_LONGEST_HEADER = 100_000_000
_PREFIX = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what the header says of it, and where its bytes begin."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The values, in memory of their own.

        Raises:
            ModelError: the file ends before they do.
        """
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        # Memory of its own, which goes back to the system as a whole when the tensor is dropped: between
        # the packed weights that stay, the allocator's own pieces would come to half a model.
        memory = mmap.mmap(-1, self.nbytes)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            _read_into(file, memoryview(memory), self.file)
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        return raw.view(self.dtype).view(self.shape)


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor of these files, by name; nothing but the headers is read.

    Raises:
        ModelError: a header that does not fit its file, or a name that stands in two files.
    """
    found: dict[str, StoredTensor] = {}
    twice: list[str] = []
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in found:
                twice.append(f"{tensor.name}: in {found[tensor.name].file.name} and {file.name}")
            found[tensor.name] = tensor
    if twice:
        raise ModelError(
            f"{files[0].parent} stores {len(twice)} tensors twice.",
            problems=twice[:10],
            meaning="Files of two models lie in one folder.",
            fix="Keep the files that model.safetensors.index.json names.",
        )
    return found


def _read_header(file: Path) -> list[StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_PREFIX), "little")
        if size < _PREFIX or length > min(_LONGEST_HEADER, size - _PREFIX):
            raise _damaged(file, f"a header of {length:,} bytes in a file of {size:,}")
        text = opened.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise _damaged(file, f"a header that is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(file, "a header that is not an object")
    begin = _PREFIX + length
    found = [_entry(file, name, entry, begin) for name, entry in header.items() if name != "__metadata__"]
    found.sort(key=lambda tensor: tensor.start)
    end = begin
    for tensor in found:
        if tensor.start != end:
            raise _damaged(file, f"{tensor.name} at {tensor.start - begin:,} instead of {end - begin:,}")
        end += tensor.nbytes
    if end != size:
        raise _damaged(file, f"tensors of {end - begin:,} bytes in a file with {size - begin:,} for them")
    return found


def _entry(file: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    fields = entry if isinstance(entry, Mapping) else {}
    dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in DTYPES:
        raise ModelError(
            f"{file} stores {name} as {dtype}, which Graft cannot read.",
            meaning=f"It reads {', '.join(DTYPES)}.",
            fix="Use a copy of this model in bfloat16.",
        )
    if not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2:
        raise _damaged(file, f"{name} without a shape and a place")
    tensor = StoredTensor(file, name, DTYPES[dtype], tuple(shape), begin + place[0])
    if place[1] - place[0] != tensor.nbytes:
        raise _damaged(file, f"{name} of shape {shape} in {place[1] - place[0]:,} bytes")
    return tensor


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _read_into(file: io.FileIO, room: memoryview, name: Path) -> None:
    """Fill `room`: one call reads 2 GiB at most."""
    while room:
        count = file.readinto(room)
        if not count:
            raise _damaged(name, f"{len(room):,} bytes less than its header says")
        room = room[count:]


def _damaged(file: Path, seen: str) -> ModelError:
    return ModelError(
        f"{file} is corrupt or cut short: {seen}.",
        meaning="The header does not fit the file; usually a download or a copy did not finish.",
        fix="Copy or download this file again.",
    )
