"""What this machine can do, measured in the same run as everything else: matrix products and copies."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from harness.case import Case, parse_case
from harness.measurement import synchronise
from harness.worker import run_process

REPEATS = 9
COPIED = 2**27
"""Bytes of the tensor that is copied: more than any cache holds."""


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second."""

    matrix: float
    """FLOPs of 16-bit products in the shapes of the model's linear layers."""
    copy: float
    """Bytes copied, read and written each counted."""


def measure_rates(case: Case) -> Rates:
    """In a process of its own, as the sides run."""
    return Rates(
        **json.loads(run_process(["-m", "harness.machine", case.dumps()], "the machine's own rates"))
    )


def matrix_rate(case: Case) -> float:
    """FLOP/s over one layer's forward products and those of the input's gradient: medians of each shape."""
    import torch

    tokens = case.rows * case.length
    operations = seconds = 0.0
    for rows, columns in case.model.matrices().values():
        weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=case.device)
        x = torch.randn(tokens, columns, dtype=torch.bfloat16, device=case.device)
        y = torch.empty(tokens, rows, dtype=torch.bfloat16, device=case.device)
        seconds += median(partial(torch.mm, x, weight.T, out=y), case.device)
        seconds += median(partial(torch.mm, y, weight, out=x), case.device)
        operations += 4.0 * tokens * rows * columns
    return operations / seconds


def copy_rate(device: str) -> float:
    """Bytes read and written a second."""
    import torch

    source = torch.zeros(COPIED // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / median(lambda: target.copy_(source), device)


def median(action: Callable[[], object], device: str) -> float:
    """Seconds of a call, after two for warming up."""
    taken = []
    for number in range(REPEATS + 2):
        synchronise(device)
        started = time.perf_counter()
        action()
        synchronise(device)
        if number >= 2:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    case = parse_case(sys.argv[1])
    print(json.dumps(asdict(Rates(matrix_rate(case), copy_rate(case.device)))))
