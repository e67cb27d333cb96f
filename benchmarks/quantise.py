"""Packing weights: time, size and error of every kind, beside bitsandbytes where it has the kind.

    python benchmarks/quantise.py [--rows 2048] [--columns 4096]

CPU time per parameter of one bf16 matrix with normal numbers, best of `--repeats` taken in turns. Codes,
scales and decoded values must equal those of bitsandbytes before a figure counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from bitsandbytes import functional
from torch import Tensor

from graftlm.quant.packed import PackedWeight, encode
from graftlm.quant.scheme import KINDS, Scheme

SCHEMES = [Scheme("nf4"), Scheme("nf4", double_quant=False), *(Scheme(kind) for kind in KINDS[1:])]


def bitsandbytes_pack(weight: Tensor, scheme: Scheme) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """What packs the weight there and gives codes and decoded values; None for kinds it does not have."""
    if scheme.is_four_bit:
        options = {"quant_type": scheme.kind, "compress_statistics": scheme.double_quant}
        return lambda: functional.quantize_4bit(weight, **options)
    if scheme.kind == "int8":
        return lambda: functional.int8_vectorwise_quant(weight)[:2]
    return None


def bitsandbytes_read(packed: tuple[Tensor, Tensor], scheme: Scheme) -> Tensor:
    read = functional.dequantize_4bit if scheme.is_four_bit else functional.int8_vectorwise_dequant
    values: Tensor = read(*packed)
    return values.to(torch.bfloat16)


def nanoseconds(work: Callable[[], object], count: int) -> float:
    start = time.process_time()
    work()
    return 1e9 * (time.process_time() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(args.rows, args.columns).to(torch.bfloat16)
    print("| kind | bits a parameter | error (RMS, relative) | pack, ns | bitsandbytes, ns | read, ns |")
    print("|---|---|---|---|---|---|")
    for scheme in SCHEMES:
        print(row(weight, scheme, args.repeats))


def row(weight: Tensor, scheme: Scheme, repeats: int) -> str:
    """One line of the table."""
    packed, theirs = encode(weight, scheme), bitsandbytes_pack(weight, scheme)
    if theirs is not None:
        require_equal(packed, theirs(), scheme)
    times: dict[str, list[float]] = {"pack": [], "theirs": [], "read": []}  # as in the table
    for _ in range(repeats):
        times["pack"].append(nanoseconds(lambda: encode(weight, scheme), weight.numel()))
        times["read"].append(nanoseconds(lambda: packed.decode(torch.bfloat16), weight.numel()))
        if theirs is not None:
            times["theirs"].append(nanoseconds(theirs, weight.numel()))
    best = {name: f"{min(found):.2f}" if found else "-" for name, found in times.items()}
    error = (packed.decode() - weight.float()).norm() / weight.float().norm()
    name = scheme.kind + (", plain scales" if scheme.is_four_bit and not scheme.double_quant else "")
    cells = (
        name,
        f"{packed.bits_per_parameter:.3f}",
        f"{error:.4f}",
        best["pack"],
        best["theirs"],
        best["read"],
    )
    return f"| {' | '.join(cells)} |"


def require_equal(packed: PackedWeight, theirs: tuple[Tensor, Tensor], scheme: Scheme) -> None:
    codes = packed.tensors["codes"]
    assert torch.equal(codes, theirs[0].view_as(codes)), "codes differ"
    assert torch.equal(packed.decode(torch.bfloat16), bitsandbytes_read(theirs, scheme)), "values differ"


if __name__ == "__main__":
    main()
