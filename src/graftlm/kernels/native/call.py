"""The compiled reader of packed weights, called with tensors. `decoding` is its definition."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graftlm.kernels.codebooks import CODEBOOKS, codebook, dynamic_map
from graftlm.kernels.decoding import SCALE_BLOCK, TILE, unit_of
from graftlm.kernels.native.opening import opened

SOURCE = Path(__file__).with_name("packed.c")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROUNDED = {torch.float32: 0, torch.bfloat16: 3, torch.float16: 4}
_KINDS = {**dict.fromkeys(CODEBOOKS, 0), "int8": 1, "fp8": 2, "fp8_block": 2}
_EIGHT_BIT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_block": torch.float8_e4m3fn}


class _Weight(ctypes.Structure):
    """The struct of the same name in packed.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "scale_scales", "scale_offset")),
        *((name, ctypes.c_void_p) for name in ("scale_map", "values")),
        *((name, ctypes.c_int64) for name in ("kind", "block", "tile", "columns")),
        ("unit", ctypes.c_float),
    )


@dataclass(frozen=True)
class Reader:
    """One packed weight on a CPU, ready to be read. Holds the tensors whose memory the struct points to."""

    compiled: ctypes.CDLL
    struct: _Weight
    rows: int
    columns: int
    held: tuple[Tensor, ...]

    def read(self, out: Tensor, rows: range, columns: range) -> None:
        """That part of the dense weight, into the contiguous `out` [rows, columns] of a type in `TYPES`."""
        self.compiled.graft_decode(
            *(ctypes.byref(self.struct), rows.start, rows.stop, columns.start, columns.stop),
            *(TYPES[out.dtype], out.data_ptr(), torch.get_num_threads()),
        )

    def multiply(self, x: Tensor) -> Tensor:
        """`x W^T` in float32, W rounded to the dtype of x. Shapes: x [T, columns] -> [T, rows]."""
        wide = x.float().contiguous()
        out = wide.new_empty(len(x), self.rows)
        self.compiled.graft_multiply(
            *(ctypes.byref(self.struct), wide.data_ptr(), len(x), 0, self.rows),
            *(_ROUNDED[x.dtype], out.data_ptr(), torch.get_num_threads()),
        )
        return out


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None (and a notice, unless the user wanted none) where there cannot be any."""
    return opened(SOURCE, load, "Packed weights are read by plain torch, at a fraction of the speed.")


def load(path: Path) -> ctypes.CDLL:
    """A library compiled from `SOURCE`, its functions declared."""
    loaded = ctypes.CDLL(str(path))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.graft_decode.argtypes = (pointer, size, size, size, size, number, pointer, number)
    loaded.graft_multiply.argtypes = (pointer, pointer, size, size, size, number, pointer, number)
    loaded.graft_decode.restype = loaded.graft_multiply.restype = None
    return loaded


def reader(
    stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int, dtype: torch.dtype
) -> Reader | None:
    """What reads the weight into tensors of `dtype`; None where only the definition can."""
    if dtype not in TYPES or not _fits(stored, kind, block, rows, columns):
        return None
    loaded = library()
    if loaded is None:
        return None
    held = (*stored, dynamic_map(), _values(kind))
    pointers = [tensor.data_ptr() for tensor in held]
    nested = pointers[2:4] if len(stored) == 4 else (None, None)
    tile = TILE if kind == "fp8_block" else 0
    struct = _Weight(
        *(*pointers[:2], *nested, *pointers[-2:], _KINDS[kind], block, tile, columns, unit_of(kind))
    )
    return Reader(loaded, struct, rows, columns, held)


def _fits(stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int) -> bool:
    """Whether the tensors have the types and sizes that the compiled code takes for granted."""
    count = rows * columns
    if kind not in _KINDS:
        return False
    if kind in _EIGHT_BIT:
        scales = rows if kind != "fp8_block" else -(-rows // TILE) * -(-columns // TILE)
        expected = [(_EIGHT_BIT[kind], count), (torch.float32, scales)]
    else:
        blocks = -(-count // block)
        expected = [(torch.uint8, -(-count // 2)), (torch.float32, blocks)]
        if len(stored) == 4:
            expected[1:] = [(torch.uint8, blocks), (torch.float32, -(-blocks // SCALE_BLOCK))]
            expected.append((torch.float32, 1))
    found = [(tensor.dtype, tensor.numel()) for tensor in stored]
    return found == expected and all(tensor.is_cpu and tensor.is_contiguous() for tensor in stored)


@cache
def _values(kind: str) -> Tensor:
    """What the codes stand for, float32: [16], or [256] by the byte."""
    if kind in CODEBOOKS:
        return codebook(kind)
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(_EIGHT_BIT[kind]).float()
