"""Dropout whose mask is a function of a seed and the place: nothing is kept, and any part can be drawn alone.

A place (row, column) of a matrix is dropped where its 16 random bits, read as a number, are below 65536 p.
Columns 2 j and 2 j + 1 have the halves of one 32-bit hash of j and of two keys that belong to the row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graftlm.kernels import dropout_cpu
from graftlm.kernels.ops import LIBRARY
from graftlm.kernels.reference import pieces
from graftlm.kernels.triton.forms import rows_in_order, triton_form

LIBRARY.define("dropped(Tensor x, float p, Tensor seed) -> Tensor")
LIBRARY.define("add_dropped(Tensor(a!) out, Tensor x, float p, Tensor seed) -> ()")

_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """How many of the 65536 numbers mean "dropped".

    >>> threshold(0.1), threshold(0.0)
    (6554, 0)
    """
    return min(round(p * 2**16), 2**16 - 1)


def kept_share(p: float) -> float:
    """The probability that a place is kept: 1 - p, to 16 bits.

    >>> kept_share(0.5)
    0.5
    """
    return 1.0 - threshold(p) / 2**16


def new_seed() -> Tensor:
    """A seed (int64 scalar on the CPU), drawn from torch's CPU generator."""
    return torch.randint(2**62, ())


def keep_mask(shape: torch.Size, p: float, seed: Tensor, device: torch.device) -> Tensor:
    """Boolean mask [T, K], False with probability `1 - kept_share(p)`."""
    rows, columns = shape
    return _kept(range(rows), columns, p, seed, device)


def _kept(rows: range, columns: int, p: float, seed: Tensor, device: torch.device) -> Tensor:
    keys = _spread(torch.arange(rows.start, rows.stop, device=device) + seed.to(device))
    hashed = torch.arange((columns + 1) // 2, device=device) * 0x9E3779B1 + (keys & _LOW).unsqueeze(1) & _LOW
    hashed = (hashed ^ hashed >> 16) * 0x7FEB352D + (keys >> 32 & _LOW).unsqueeze(1) & _LOW
    hashed = (hashed ^ hashed >> 15) * 0x846CA68B & _LOW
    hashed = hashed ^ hashed >> 16
    halves = torch.stack([hashed & 0xFFFF, hashed >> 16], dim=-1).flatten(1)
    return halves[:, :columns] >= threshold(p)


def _spread(counters: Tensor) -> Tensor:
    """64 bits for each counter (splitmix64); int64 wraps around, and `>>` would draw in its sign."""
    z = counters * -0x61C8864680B583EB
    z = (z ^ (z >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & 2**33 - 1)


def _dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Shapes: x [T, K]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in pieces(x):
        part = range(*rows.indices(len(x)))
        out[rows] = torch.where(_kept(part, x.shape[1], p, seed, x.device), x[rows], 0)
    return out


def _add_dropped(out: Tensor, x: Tensor, p: float, seed: Tensor) -> None:
    """Shapes: out, x [T, K]."""
    for rows in pieces(x):
        part = range(*rows.indices(len(x)))
        out[rows] += torch.where(_kept(part, x.shape[1], p, seed, x.device), x[rows], 0)


def _dropped_compiled(x: Tensor, p: float, seed: Tensor) -> Tensor:
    found = dropout_cpu.dropped(x, threshold(p), seed)
    return _dropped(x, p, seed) if found is None else found


def _add_dropped_compiled(out: Tensor, x: Tensor, p: float, seed: Tensor) -> None:
    if not dropout_cpu.add_dropped(out, x, threshold(p), seed):
        _add_dropped(out, x, p, seed)


def _dropped_by_triton(x: Tensor, p: float, seed: Tensor) -> Tensor:
    form = triton_form("dropped", x)
    if form is None:
        return _dropped(x, p, seed)
    found: Tensor = form(rows_in_order(x), threshold(p), seed)
    return found


def _add_dropped_by_triton(out: Tensor, x: Tensor, p: float, seed: Tensor) -> None:
    form = triton_form("add_dropped", out, x) if out.stride(-1) == 1 else None
    if form is None:
        _add_dropped(out, x, p, seed)
    else:
        form(out, rows_in_order(x), threshold(p), seed)


for _name, _definition, _compiled, _by_triton in (
    ("dropped", _dropped, _dropped_compiled, _dropped_by_triton),
    ("add_dropped", _add_dropped, _add_dropped_compiled, _add_dropped_by_triton),
):
    LIBRARY.impl(_name, _definition, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _compiled, "CPU")
    LIBRARY.impl(_name, _by_triton, "CUDA")


@torch.library.register_fake("graft::dropped", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _dropped_shape(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("graft::add_dropped", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _add_dropped_shape(out: Tensor, x: Tensor, p: float, seed: Tensor) -> None:
    return None


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """`x` with zeros where the mask drops it; `x` itself without a seed. Shapes: x [T, K].

    The factor `1 / kept_share(p)` is left to whoever multiplies with a scale anyway, where 16-bit rounding
    does not shift it. No autograd.
    """
    if seed is None:
        return x
    result: Tensor = torch.ops.graft.dropped(x, p, seed)
    return result


def add_dropped(out: Tensor, x: Tensor, p: float, seed: Tensor | None) -> None:
    """`out += dropped(x, p, seed)`. Shapes: out, x [T, K] of one dtype."""
    if seed is None:
        out += x
    else:
        torch.ops.graft.add_dropped(out, x, p, seed)


def dropped_lanes(x: Tensor, chances: Mapping[int, tuple[float, Tensor]]) -> Tensor:
    """`dropped` of those x[lane] that have a probability and a seed, and the others as they are.

    Shapes: x [lanes, T, K]. No autograd.
    """
    if not chances:
        return x
    found = dropout_cpu.dropped_lanes(x, _numbers(chances)) if x.is_cpu else None
    if found is None:
        found = x.clone()
        for lane, (p, seed) in chances.items():
            found[lane] = dropped(x[lane], p, seed)
    return found


def add_dropped_lanes(out: Tensor, x: Tensor, chances: Mapping[int, tuple[float, Tensor]]) -> None:
    """`out[lane] += dropped(x[lane], p, seed)`, without dropping where there is no chance.

    Shapes: out, x [lanes, T, K] of one dtype.
    """
    if x.is_cpu and dropout_cpu.add_dropped_lanes(out, x, _numbers(chances)):
        return
    for lane in range(len(x)):
        p, seed = chances.get(lane, (0.0, None))
        add_dropped(out[lane], x[lane], p, seed)


def _numbers(chances: Mapping[int, tuple[float, Tensor]]) -> dict[int, dropout_cpu.Chance]:
    return {lane: (threshold(p), int(seed.item())) for lane, (p, seed) in chances.items()}
