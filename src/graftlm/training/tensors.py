"""Named tensors on disk in the safetensors format: streamed out, strictly checked on the way in.

The library's own writer is native code that reports a full disk as an opaque error; this one writes
the same simple layout (8 bytes length, JSON header, data) one tensor at a time through `core.storage`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.core.errors import CheckpointError
from graftlm.core.storage import write_new

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new safetensors file; the same tensors always give the same bytes.

    At most one tensor is copied to the host at a time. Syncing is left to the caller.
    """
    write_new(path, _chunks(tensors))


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes `write_tensors` will write, near enough (the header is counted generously)."""
    data = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return data + sum(2 * len(name) + 128 for name in tensors)


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    # Widest elements first, so that every tensor stays aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a file that must hold exactly `expected`: same names, shapes and dtypes (values ignored).

    Raises:
        CheckpointError: lists every missing, unexpected, mis-shaped or mis-typed tensor.
    """
    found = load_file(path)
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: unexpected" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        seen, wanted = _kind(found[name]), _kind(expected[name])
        if seen != wanted:
            problems.append(f"{name}: is {seen}, the model has {wanted}")
    if problems:
        raise CheckpointError(
            f"{path} does not fit what is trained now.",
            problems=sorted(problems),
            meaning="The model or the adapter changed since it was written.",
            fix="Resume with the recipe that wrote it, or start in a new folder.",
        )
    return found


def _kind(tensor: Tensor) -> str:
    return f"{_NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"
