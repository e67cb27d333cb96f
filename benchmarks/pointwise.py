"""Elementwise layers and the loss against the forms that models write, and against what memory allows.

    python benchmarks/pointwise.py [--repeats 15] [--dtype bfloat16] [--tokens 2048] [--clock processor]

Both sides see the same tensors and take turns in one process; figures are medians in ms, of the forward pass
alone and of forward and backward. The floor is the bytes that have to be read and written once, at the rate
of a copy measured in the same run; for the loss it is the two products with the head, at the rate of a square
product. A row is void unless outputs and gradients agree within 16-bit rounding. Processor time is for a
machine that is busy with other work, with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from graftlm.core.allocation import freed_memory_kept
from graftlm.core.compiling import state
from graftlm.kernels.ops import linear_cross_entropy
from graftlm.kernels.pointwise import gated_silu, rms_norm, rope

WIDTH, MIDDLE, HEADS, KEYS, HEAD = 1024, 2816, 16, 16, 64
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Form = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Row:
    """One operator in both forms, functions of `inputs`, and the seconds that no form can beat."""

    name: str
    ours: Form
    theirs: Form
    inputs: tuple[Tensor, ...]
    floors: tuple[float, float]


def rows(tokens: int, vocabulary: int, dtype: torch.dtype, clock: Callable[[], float]) -> list[Row]:
    torch.manual_seed(0)
    x, gate, up = (torch.randn(tokens, width).to(dtype) for width in (WIDTH, MIDDLE, MIDDLE))
    q, k = (torch.randn(1, tokens, heads, HEAD).to(dtype) for heads in (HEADS, KEYS))
    norm = LlamaRMSNorm(WIDTH, eps=1e-6).to(dtype).requires_grad_(False)
    angle = torch.rand(1, tokens, HEAD // 2).repeat(1, 1, 2) * 7
    angles = angle.cos().to(dtype), angle.sin().to(dtype)
    head, labels = (torch.randn(vocabulary, WIDTH) * 0.02).to(dtype), torch.randint(vocabulary, (tokens,))
    copied, multiplied = copy_rate(dtype, clock), product_rate(dtype, clock)

    def of_bytes(forward: int, backward: int, one: Tensor) -> tuple[float, float]:
        size = one.numel() * one.element_size() / copied
        return forward * size, (forward + backward) * size

    def turned(function: Callable[..., tuple[Tensor, Tensor]]) -> Form:
        return lambda a, b: function(a.transpose(1, 2), b.transpose(1, 2), *angles)

    product = 2 * tokens * WIDTH * vocabulary / multiplied
    return [
        Row("rms_norm", lambda a: rms_norm(a, norm.weight, 1e-6), norm, (x,), of_bytes(2, 3, x)),
        Row("gated_silu", gated_silu, lambda a, b: F.silu(a) * b, (gate, up), of_bytes(3, 5, gate)),
        Row("rope", turned(rope), turned(apply_rotary_pos_emb), (q, k), of_bytes(4, 4, q)),
        Row(
            "cross_entropy",
            lambda a: linear_cross_entropy(a, head, labels),
            lambda a: F.cross_entropy((a @ head.t()).float(), labels, reduction="sum"),
            (x,),
            (product, 2 * product),
        ),
    ]


def copy_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Bytes a second, read and written each counted."""
    source = torch.ones(2**24).to(dtype)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), clock) for _ in range(10))
    return 2 * source.numel() * source.element_size() / seconds


def product_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations a second of a square product."""
    square = torch.ones(2048, 2048).to(dtype)
    return 2 * 2048**3 / min(timed(lambda: square @ square, clock) for _ in range(5))


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def measure(row: Row, repeats: int, clock: Callable[[], float]) -> dict[str, tuple[float, float]]:
    """Median seconds of forward, and of forward and backward, for each side."""
    leaves = [tensor.clone().requires_grad_() for tensor in row.inputs]
    flow = [torch.randn_like(result) for result in results(row.ours(*leaves))]
    sides = {"ours": row.ours, "theirs": row.theirs}
    found: dict[str, list[SimpleNamespace]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, form in sides.items():
            started = clock()
            out = results(form(*leaves))
            forward = clock() - started
            started = clock()
            torch.autograd.grad(out, leaves, flow)
            found[side].append(SimpleNamespace(forward=forward, both=forward + clock() - started))
            del out
    return {
        side: tuple(statistics.median(getattr(run, part) for run in runs) for part in ("forward", "both"))
        for side, runs in found.items()
    }


def results(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def require_agreement(row: Row) -> None:
    """Stop unless outputs and gradients are the same but for rounding."""
    both = []
    for form in (row.ours, row.theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in row.inputs]
        out = results(form(*leaves))
        torch.manual_seed(1)
        flow = [torch.randn(each.shape).to(each.dtype) for each in out]
        both.append((*out, *torch.autograd.grad(out, leaves, flow)))
    for mine, its in zip(*both, strict=True):
        if (mine - its).float().norm() > 2 * torch.finfo(row.inputs[0].dtype).eps * its.float().norm():
            raise SystemExit(f"void: {row.name} does not compute the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    given = parser.parse_args()
    clock = CLOCKS[given.clock]
    print(f"compiled: {state()[1]}; {torch.get_num_threads()} threads")
    print("| operator | pass | ours ms | model's own ms | times | floor ms |\n|---|---|---|---|---|---|")
    with freed_memory_kept():
        for row in rows(given.tokens, given.vocabulary, getattr(torch, given.dtype), clock):
            require_agreement(row)
            times = measure(row, given.repeats, clock)
            for number, part in enumerate(("forward", "and backward")):
                ours, theirs = (1e3 * times[side][number] for side in ("ours", "theirs"))
                floor = 1e3 * row.floors[number]
                print(
                    f"| {row.name} | {part} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} | {floor:.2f} |"
                )


if __name__ == "__main__":
    main()
