"""A weight matrix in few bits: a pure value, with `encode` to make it and `decode` to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from graftlm.core.errors import ModelError
from graftlm.kernels import quantised
from graftlm.kernels.decoding import PARTS, SCALE_BLOCK, TILE
from graftlm.kernels.encoding import (
    FLOAT8,
    encode_blocks,
    encode_rows_fp8,
    encode_rows_int8,
    encode_scales,
    encode_tiles_fp8,
)
from graftlm.quant.scheme import Scheme

CODE_TYPES = {
    "nf4": torch.uint8,
    "fp4": torch.uint8,
    "int8": torch.int8,
    "fp8": FLOAT8,
    "fp8_block": FLOAT8,
}
"""The dtype that the codes of each kind are held in."""


@dataclass(frozen=True)
class PackedWeight:
    """One weight [out, in] as stored: the tensors `codes`, `scales` and, where scales are quantised too,
    `scale_scales` and `scale_offset`.

    4-bit kinds: codes uint8 [ceil(out * in / 2)], the first of a pair in the high bits; scales float32
    [blocks] (largest magnitude of each block), or uint8 [blocks] with float32 [ceil(blocks / 256)] and [].
    int8: codes int8 [out, in], scales float32 [out] (largest magnitude of each row).
    fp8: codes float8_e4m3fn [out, in], scales float32 [out] (largest magnitude / 448).
    fp8_block: the same with scales float32 [ceil(out / 128), ceil(in / 128)].
    """

    scheme: Scheme
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def stored(self) -> list[Tensor]:
        """The tensors in the order that operators take them in."""
        return [self.tensors[name] for name in PARTS if name in self.tensors]

    @property
    def bits_per_parameter(self) -> float:
        """Measured on the tensors."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        return 8 * size / (self.shape[0] * self.shape[1])

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out, in], computed in float32 and rounded once."""
        return quantised.decode(self.stored, self.scheme.kind, self.scheme.block_size, *self.shape, dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Only these rows, decoded, of a kind with a scale for each row. Shapes: index [n] -> [n, in]."""
        own = [tensor.index_select(0, index) for tensor in self.stored]
        scheme = self.scheme
        return quantised.decode(own, scheme.kind, scheme.block_size, len(index), self.shape[1], dtype)

    def lines(self, start: int, stop: int) -> PackedWeight:
        """The rows from `start` to before `stop`, of a kind with a scale for each row; no copy."""
        own = {name: tensor[start:stop] for name, tensor in self.tensors.items()}
        return PackedWeight(self.scheme, (len(own["codes"]), self.shape[1]), MappingProxyType(own))


def layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a weight [out, in] is stored in.

    >>> layout(Scheme("nf4", double_quant=False), (2, 64))
    {'codes': ((64,), torch.uint8), 'scales': ((2,), torch.float32)}
    """
    rows, columns = shape
    if not scheme.is_four_bit:
        tiles = (-(-rows // TILE), -(-columns // TILE))
        scales = (rows,) if scheme.has_row_scales else tiles
        return {"codes": (shape, CODE_TYPES[scheme.kind]), "scales": (scales, torch.float32)}
    count = rows * columns
    blocks = -(-count // scheme.block_size)
    codes = {"codes": ((-(-count // 2),), torch.uint8)}
    if not scheme.double_quant:
        return {**codes, "scales": ((blocks,), torch.float32)}
    return {
        **codes,
        "scales": ((blocks,), torch.uint8),
        "scale_scales": ((-(-blocks // SCALE_BLOCK),), torch.float32),
        "scale_offset": ((), torch.float32),
    }


@torch.no_grad()
def encode(weight: Tensor, scheme: Scheme, *, name: str = "weight") -> PackedWeight:
    """The weight [out, in] in that scheme; `name` is what an error calls it.

    Raises:
        ModelError: no matrix, or numbers that no scale can hold: NaN, infinity, beyond float32.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ModelError(
            f"{name} is a {list(weight.shape)} of {weight.dtype}.",
            meaning="Only matrices of floating-point numbers are quantised.",
            fix="Leave that layer as it is.",
        )
    tensors = _encoded(weight, scheme)
    if not all(torch.isfinite(part).all() for part in tensors.values() if part.dtype == torch.float32):
        raise _not_finite(weight, name)
    rows, columns = weight.shape
    return PackedWeight(scheme, (rows, columns), MappingProxyType(tensors))


_EIGHT_BIT = {"int8": encode_rows_int8, "fp8": encode_rows_fp8, "fp8_block": encode_tiles_fp8}


def _encoded(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    if not scheme.is_four_bit:
        codes, scales = _EIGHT_BIT[scheme.kind](weight)
        return {"codes": codes, "scales": scales}
    codes, scales = encode_blocks(weight, scheme.kind, scheme.block_size)
    if not scheme.double_quant:
        return {"codes": codes, "scales": scales}
    scale_codes, scale_scales, offset = encode_scales(scales)
    return {"codes": codes, "scales": scale_codes, "scale_scales": scale_scales, "scale_offset": offset}


def _not_finite(weight: Tensor, name: str) -> ModelError:
    bad = sum(int((~torch.isfinite(row)).sum()) for row in weight)
    if bad:
        return ModelError(
            f"{name} holds {bad} values that are NaN or infinite.",
            meaning="A damaged download, or a model whose training diverged; quantised, one such value would "
            "wipe out its block.",
            fix="Copy or download the model again.",
        )
    largest = weight.abs().max().item()
    return ModelError(
        f"{name} holds values up to {largest:.3g}, whose scales leave the range of float32.",
        meaning="No trained model has such weights: a damaged download.",
        fix="Copy or download the model again.",
    )
