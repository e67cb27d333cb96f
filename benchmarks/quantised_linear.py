"""Linear layers on NF4 weights against bitsandbytes and against a dense 16-bit weight, forward and backward.

    python benchmarks/quantised_linear.py [--repeats 9] [--dtype bfloat16] [--clock processor]

All sides hold the same weight (ours and bitsandbytes' the same codes, scales quantised too), take turns in
one process and see the same input. `read` is the time to make the dense weight, in ns per parameter; `step`
that of a forward and the gradient of the input, in ms (one token: forward alone, as in generation). A row is
void unless the dense weights are equal to the bit, and outputs and gradients agree within 16-bit rounding.
Processor time is for a machine that is busy with other work, with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import bitsandbytes
import torch
from torch import Tensor, nn

from graftlm.core.compiling import state
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme

SHAPES = ((1024, 1024), (4096, 1024), (4096, 4096))
TOKENS = (1, 256, 2048)
SIDES = ("Graft", "bitsandbytes", "dense")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TOLERANCE = 2e-2
"""Of the largest value: a few bf16 roundings."""


@dataclass(frozen=True)
class Sides:
    """One weight in three layers."""

    ours: QuantisedLinear
    theirs: nn.Module
    dense: nn.Linear

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        yield from zip(SIDES, (self.ours, self.theirs, self.dense), strict=True)


def build(rows: int, columns: int, dtype: torch.dtype) -> Sides:
    """The same random weight, quantised by each side; the dense one is what both decode to."""
    torch.manual_seed(0)
    weight = (torch.randn(rows, columns) * 0.02).to(dtype)
    ours = QuantisedLinear(encode(weight, Scheme("nf4")), None, dtype)
    theirs = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu")
    dense = nn.Linear(columns, rows, bias=False, dtype=dtype)
    dense.weight = nn.Parameter(ours.weight, requires_grad=False)
    return Sides(ours, theirs, dense)


def read_by_bitsandbytes(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    weight = layer.get_parameter("weight")
    return bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state).to(dtype)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output and gradient of the input; of one token the output alone."""
    if len(x) == 1:
        with torch.no_grad():
            return layer(x), None
    x.grad = None
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad


def agree(sides: Sides, x: Tensor, grad: Tensor) -> bool:
    """Whether every side computes the same from the same weight."""
    if not torch.equal(read_by_bitsandbytes(sides.theirs, x.dtype), sides.ours.weight):
        return False
    expected = step(sides.dense, x, grad)
    return all(
        bool((value - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
        for _, layer in sides
        for value, wanted in zip(step(layer, x, grad), expected, strict=True)
        if value is not None and wanted is not None
    )


def medians(
    runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of each, in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(clock() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def line(label: str, figures: dict[str, float], scale: float) -> str:
    ours = figures["Graft"]
    cells = [f"{scale * figures[name]:>14.3f}" if name in figures else f"{'':>14}" for name in SIDES]
    cells += [f"{figures[name] / ours:>14.2f}" for name in SIDES[1:] if name in figures]
    return f"{label:>30}{''.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    given = parser.parse_args()
    clock = CLOCKS[given.clock]
    dtype = getattr(torch, given.dtype)
    print(
        f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, {given.dtype}, "
        f"{torch.get_num_threads()} threads, {given.clock} time; compiled code: {state()[1]}"
    )
    names = (*SIDES, *(f"{name[:6]} : ours" for name in SIDES[1:]))
    print(f"{'':>30}{''.join(f'{name:>14}' for name in names)}")
    for rows, columns in SHAPES:
        sides = build(rows, columns, dtype)
        runs: dict[str, Callable[[], object]] = {
            "Graft": lambda sides=sides: sides.ours.weight,  # type: ignore[misc]
            "bitsandbytes": lambda sides=sides: read_by_bitsandbytes(sides.theirs, dtype),  # type: ignore[misc]
        }
        figures = medians(runs, given.repeats, clock)
        print(line(f"{rows}x{columns} read, ns/param", figures, 1e9 / rows / columns))
        for tokens in TOKENS:
            x = torch.randn(tokens, columns).to(dtype).requires_grad_()
            grad = torch.randn(tokens, rows).to(dtype)
            if not agree(sides, x, grad):
                raise SystemExit(f"void: {rows}x{columns}, {tokens} tokens: the sides differ")
            steps = {
                name: lambda layer=layer, x=x, grad=grad: step(layer, x, grad)  # type: ignore[misc]
                for name, layer in sides
            }
            print(line(f"{tokens} tokens, ms", medians(steps, given.repeats, clock), 1e3), flush=True)


if __name__ == "__main__":
    main()
