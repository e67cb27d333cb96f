"""Causal attention over documents against torch's on a CPU, forward and backward, in bfloat16.

    python benchmarks/attention.py [--repeats 9] [--clock processor] [--tokens 4096]

Each row has the same number of tokens in documents of one length; `mixed` has seven documents of unlike
lengths in one row, which torch can only take with a mask. Both sides take turns in one process and see the
same values. torch gets what its kernel likes best: [documents, heads, length, width], keys repeated for
grouped queries beforehand, is_causal (for `mixed`, a boolean mask). `floor` is the time of the products
alone at the rate of torch's own bfloat16 matrix product, measured here: two in forward, five in backward,
half of each below the diagonal. A row is void unless output and gradients agree within 16-bit rounding.
Processor time is for a machine that is busy with other work, with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from graftlm.core.compiling import state
from graftlm.kernels.attention import attention, attention_is_native

LENGTHS = (512, 1024, 2048, 4096, 8192)
SHAPES = ((16, 16, 64), (16, 4, 64), (16, 8, 128))
"""Query heads, key heads, width."""

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TOLERANCE = 2e-2
"""Of the norm: a few bf16 roundings."""


@dataclass(frozen=True)
class Problem:
    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    width: int

    @property
    def starts(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def products(self) -> float:
        """Operations of one of the seven products of forward and backward, below the diagonal."""
        return sum(self.heads * self.width * n * (n + 1) for n in self.lengths)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, [tokens, heads, width]."""
        torch.manual_seed(0)
        tokens = sum(self.lengths)
        q, k, v, grad = (
            torch.randn(tokens, heads, self.width).bfloat16()
            for heads in (self.heads, self.key_heads, self.key_heads, self.heads)
        )
        return q, k, v, grad


Step = Callable[[], tuple[Tensor, ...]]


def our_step(problem: Problem, *, backward: bool) -> Step:
    *inputs, grad = problem.inputs()
    starts, scale = problem.starts, problem.width**-0.5
    q, k, v = (x.requires_grad_(backward) for x in inputs)

    def step() -> tuple[Tensor, ...]:
        out = attention(q, k, v, starts, scale=scale)
        return (out, *torch.autograd.grad(out, (q, k, v), grad)) if backward else (out,)

    return step


def torch_step(problem: Problem, *, backward: bool) -> Step:
    """Documents of one length as a batch; others in one row behind a mask."""
    *inputs, grad = problem.inputs()
    same = len(set(problem.lengths)) == 1
    batch = len(problem.lengths) if same else 1

    def batched(x: Tensor) -> Tensor:
        made: Tensor = x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
        return made

    q, k, v = (batched(x.repeat_interleave(problem.heads // x.shape[1], 1)) for x in inputs)
    q, k, v = (x.requires_grad_(backward) for x in (q, k, v))
    of_out, mask = batched(grad), None
    if not same:
        document = torch.repeat_interleave(torch.tensor(problem.lengths))
        mask = (document.unsqueeze(1) == document).tril_()

    def step() -> tuple[Tensor, ...]:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=same)
        return (out, *torch.autograd.grad(out, (q, k, v), of_out)) if backward else (out,)

    return step


def agree(problem: Problem) -> bool:
    """Whether both sides compute the same; of theirs, the gradients of repeated keys are summed."""
    ours = our_step(problem, backward=True)()
    theirs = (x.detach().transpose(1, 2).flatten(0, 1).float() for x in torch_step(problem, backward=True)())
    pairs = ((a, b.unflatten(1, (a.shape[1], -1)).sum(2)) for a, b in zip(ours, theirs, strict=True))
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)


def medians(runs: dict[str, Step], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each, in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(clock() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def matrix_rate(clock: Callable[[], float]) -> float:
    """Operations a second of a large bfloat16 product: the best of several."""
    x = torch.randn(2048, 2048).bfloat16()
    best = float("inf")
    for _ in range(12):
        started = clock()
        x @ x
        best = min(best, clock() - started)
    return 2 * 2048**3 / best


def problems(tokens: int) -> list[tuple[str, Problem]]:
    rows = [
        (f"{tokens // length} x {length}", Problem((length,) * (tokens // length), *shape))
        for shape in SHAPES
        for length in LENGTHS
        if length <= tokens
    ]
    mixed = [max(1, tokens * part // 64) for part in (1, 2, 3, 5, 8, 13, 32)]
    return rows + [("mixed", Problem(tuple(mixed), *shape)) for shape in SHAPES]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    clock = CLOCKS[given.clock]
    rate = matrix_rate(clock)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.clock} time, "
        f"matrix product {rate / 1e12:.2f} Tflop/s; compiled code: {state()[1]}; "
        f"attention: {attention_is_native(torch.bfloat16, 64) or 'compiled'}"
    )
    names = ("ours", "torch", "torch : ours", "floor")
    print(f"{'documents, heads, width':>34}{'':>10}{''.join(f'{name:>14}' for name in names)}  ms")
    for label, problem in problems(given.tokens):
        if not agree(problem):
            raise SystemExit(f"void: {label}: the sides differ")
        for what, backward, products in (("forward", False, 2), ("both", True, 7)):
            runs = {
                "ours": our_step(problem, backward=backward),
                "torch": torch_step(problem, backward=backward),
            }
            figures = medians(runs, given.repeats, clock)
            ours, theirs = 1e3 * figures["ours"], 1e3 * figures["torch"]
            floor = 1e3 * products * problem.products / rate
            shape = f"{label}, {problem.heads}/{problem.key_heads} x {problem.width}"
            print(
                f"{shape:>34}{what:>10}{ours:>14.2f}{theirs:>14.2f}{theirs / ours:>14.2f}{floor:>14.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
