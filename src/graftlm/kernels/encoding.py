"""Plain torch definitions of how weights are packed: numbers to codes and scales.

Equal to the CPU library of bitsandbytes to the bit, on every device. Work goes in pieces that fit a cache, so
nothing much larger than the result is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels.codebooks import codebook, dynamic_map
from graftlm.kernels.decoding import SCALE_BLOCK, TILE

FLOAT8 = torch.float8_e4m3fn
_CELLS = 2048
_SMALLEST = 1e-38  # bitsandbytes divides by no scale under this


def encode_blocks(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [ceil(n / 2)], the first of a pair in the high bits, and scales float32 [ceil(n / block)].

    A scale is the largest magnitude of its block; it is NaN or infinite where the block holds such a number.
    """
    flat = weight.reshape(-1)
    codes = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty(-(-len(flat) // block), dtype=torch.float32, device=weight.device)
    size = _piece(weight)
    for start in range(0, len(flat), size):
        scaled, found = _scaled(flat[start : start + size].float(), block)
        codes[start // 2 : start // 2 + -(-len(scaled) // 2)] = _paired(_nearest(scaled, kind), kind)
        scales[start // block : start // block + len(found)] = found
    return codes, scales


def encode_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of scales [n]: codes uint8 [n] of the dynamic map, their own scales float32
    [ceil(n / 256)], and the offset float32 [] that was taken off first, the mean.
    """
    offset = scales.mean()
    centred = scales - offset
    blocks = F.pad(centred, (0, -len(scales) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / largest).unsqueeze(1)).flatten()[: len(scales)]
    # A block without any deviation gives 0 / 0, which the library stores as code 0.
    step = (scaled.nan_to_num_(nan=-1.0).clamp_(-1.0, 1.0) + 1.0) * 0.5 * (_STEPS - 1) + 0.5
    return _dynamic_codes(scales.device).index_select(0, step.int()), largest, offset


def encode_rows_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and the largest magnitude of each row, float32 [out].

    A row whose numbers are all under 1e-36 becomes zero.
    """
    codes, largest = torch.empty_like(weight, dtype=torch.int8), _largest_of_rows(weight)
    factor = (127.0 / largest).nan_to_num(posinf=0.0).unsqueeze(1)
    for rows in _row_pieces(weight):
        codes[rows] = (weight[rows].float() * factor[rows]).round_().to(torch.int8)
    return codes, largest


def encode_rows_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [out, in] and the scale of each row, float32 [out]: its largest magnitude / 448."""
    codes, top = torch.empty_like(weight, dtype=FLOAT8), torch.finfo(FLOAT8).max
    scales = _largest_of_rows(weight).clamp(min=1e-30) / top
    for rows in _row_pieces(weight):
        scaled = weight[rows].float() / scales[rows].unsqueeze(1)
        codes[rows] = scaled.clamp_(-top, top).to(FLOAT8)
    return codes, scales


def encode_tiles_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [out, in] and the scale of each tile of 128 x 128, float32 [ceil(out / 128),
    ceil(in / 128)]: its largest magnitude / 448."""
    codes, top = torch.empty_like(weight, dtype=FLOAT8), torch.finfo(FLOAT8).max
    found = []
    for lines, values in zip(codes.split(TILE), weight.split(TILE), strict=True):
        wide = F.pad(values.float(), (0, -weight.shape[1] % TILE)).view(len(values), -1, TILE)
        scales = wide.abs().amax(dim=(0, 2)).clamp(min=1e-30) / top
        scaled = (wide / scales.unsqueeze(1)).clamp_(-top, top).flatten(1)
        lines.copy_(scaled[:, : weight.shape[1]])
        found.append(scales)
    return codes, torch.stack(found)


def _piece(weight: Tensor) -> int:
    """Numbers at a time, a multiple of every block size: what a cache holds; on a GPU, what keeps it busy."""
    return 2**17 if weight.is_cpu else 2**24


def _scaled(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The values divided by the scale of their block, and the scales.

    Whole blocks are multiplied with the inverse of their scale, a short one at the end is divided by it, and
    its scale is never under 1e-38: so does the library.
    """
    whole = len(values) - len(values) % block
    blocks, rest = values[:whole].view(-1, block), values[whole:]
    scales = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / scales.clamp(min=_SMALLEST)).unsqueeze(1)).flatten()
    if len(rest):
        last = rest.abs().amax().clamp(min=_SMALLEST)
        scales, scaled = torch.cat([scales, last.view(1)]), torch.cat([scaled, rest / last])
    return scaled.nan_to_num_(nan=0.0).clamp_(-1.0, 1.0), scales


def _nearest(scaled: Tensor, kind: str) -> Tensor:
    """The code nearest to each number of [-1, 1], uint8; halfway between two values it is the lower one.

    [-1, 1] is cut so finely that no cell has more than one border between two codes: one comparison decides.
    """
    ranks, borders, order = _cells(kind, scaled.device)
    cell = _cell_of(scaled)
    rank = ranks.index_select(0, cell).add_(scaled > borders.index_select(0, cell))
    return rank if kind == "nf4" else order.index_select(0, rank.int())


@cache
def _cells(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """By cell: how many borders lie in cells before it, and its own border or infinity; by rank: the code."""
    values, order = codebook(kind).sort(stable=True)
    borders = (values[:-1] + values[1:]) / 2
    own = torch.full((_CELLS + 1,), torch.inf)
    own[_cell_of(borders)] = borders
    before = torch.bucketize(torch.arange(_CELLS + 1), _cell_of(borders))
    return before.to(torch.uint8).to(device), own.to(device), order.to(torch.uint8).to(device)


def _cell_of(scaled: Tensor) -> Tensor:
    """Rounding included, this never falls where `scaled` rises, which is all that is asked of it."""
    return scaled.mul(_CELLS / 2).add_(_CELLS / 2).int()


def _paired(codes: Tensor, kind: str) -> Tensor:
    """Two codes in a byte; a single one at the end goes with the code of zero."""
    if len(codes) % 2:
        codes = torch.cat([codes, _nearest(torch.zeros(1, device=codes.device), kind)])
    return (codes[::2] << 4) | codes[1::2]


_STEPS = 2**16


@cache
def _dynamic_codes(device: torch.device) -> Tensor:
    """Codes of the dynamic map for 65,536 numbers evenly over [-1, 1]: the library's table on a CPU."""
    values = dynamic_map()
    steps = -1.0 + (2.0 * torch.arange(_STEPS, dtype=torch.float32)) / (_STEPS - 1)
    return torch.bucketize(steps, 0.5 * (values[:-1] + values[1:])).to(torch.uint8).to(device)


def _largest_of_rows(weight: Tensor) -> Tensor:
    return torch.cat([weight[rows].abs().amax(dim=1).float() for rows in _row_pieces(weight)])


def _row_pieces(weight: Tensor) -> Iterator[slice]:
    step = max(1, _piece(weight) // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))
