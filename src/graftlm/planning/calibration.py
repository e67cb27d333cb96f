"""How fast this machine is, measured in a few seconds in the kinds of work that a training step has.

Each figure is the best of several tries: what the machine does when nothing else runs on it. A plan that
meets a busy machine is corrected by the run's own steps (see `correction`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftlm.core.environment import Environment
from graftlm.kernels.attention import attention
from graftlm.kernels.encoding import encode_blocks
from graftlm.kernels.quantised import decode
from graftlm.planning.gpus import ATTENTION_SHARE, DISK_READ, gpu_named
from graftlm.planning.machine import Rates
from graftlm.planning.work import ATTENTION_BACKWARD, ATTENTION_START

TOKENS = 1024
SHAPES = ((768, 768), (2048, 768), (1024, 2816))
"""Rows and columns of linear layers as small decoders have them; larger ones run at the same rate."""
GPU_SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096))
TRIES, SECONDS = 7, 0.4
"""Each figure: at most so many tries in at most so much time (two tries at least)."""
COPIED = 2**27
"""Bytes of the tensor that is copied: more than caches hold."""
READ = 2**26
HEADS, HEAD_SIZE, DOCUMENT = 8, 64, 1024
CHAIN = 64
"""Small operations one after another, with their gradients."""

THREADS_WAIT = 1.65
"""Times an operation, where several threads meet at its end."""

ASSUMED = {"AMX BF16": 1.2e12, "AVX-512 BF16": 2e11, "ARM BF16": 1e11}
"""Operations per second and core in bfloat16 where nothing was measured."""
ASSUMED_FLOAT32, ASSUMED_FLOAT32_WIDE = 4e10, 1e11
ASSUMED_BANDWIDTH = 1.5e10
ASSUMED_OPERATION = 20e-6


def measure_rates(device: torch.device, folder: Path | None) -> Rates:
    """Measure what one step is made of; nothing of torch's state is changed.

    Args:
        folder: where a file may be written and read back; None assumes a usual disk.
    """
    kinds = ("bfloat16", "float32")
    shapes = GPU_SHAPES if device.type == "cuda" else SHAPES
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        matrix = {kind: _matrix_rate(device, getattr(torch, kind), shapes) for kind in kinds}
        return Rates(
            matrix=matrix,
            bandwidth=_copy_rate(device),
            operation_seconds=_operation_seconds(device),
            disk_read=_disk_rate(folder) if folder is not None else DISK_READ,
            is_measured=True,
            attention={kind: _attention_rate(device, getattr(torch, kind)) for kind in kinds},
            decoding=_decoding_rate(device),
        )


def assumed_rates(found: Environment) -> Rates:
    """Usual figures of a machine of that kind, where nothing was measured."""
    if found.gpus:
        with contextlib.suppress(ValueError):  # a card that is not in the table is counted as a processor
            return gpu_named(found.gpus[0].name).rates
    wide = any(name.startswith("AVX-512") for name in found.instruction_sets)
    single = found.cores * (ASSUMED_FLOAT32_WIDE if wide else ASSUMED_FLOAT32)
    half = max((found.cores * ASSUMED.get(name, 0.0) for name in found.instruction_sets), default=0.0)
    matrix = {"float32": single, "bfloat16": half or single / 4}
    return Rates(
        matrix=matrix,
        bandwidth=ASSUMED_BANDWIDTH * min(found.cores, 4) ** 0.5,
        operation_seconds=ASSUMED_OPERATION,
        disk_read=DISK_READ,
        attention={kind: ATTENTION_SHARE * rate for kind, rate in matrix.items()},
    )


def _matrix_rate(device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]) -> float:
    """Of forward products and those of the input's gradient."""
    operations = seconds = 0.0
    for rows, columns in shapes:
        weight = torch.randn(rows, columns, device=device).to(dtype)
        x = torch.randn(TOKENS, columns, device=device).to(dtype)
        y = torch.empty(TOKENS, rows, dtype=dtype, device=device)
        taken = _best(partial(torch.mm, x, weight.T, out=y), device)
        taken += _best(partial(torch.mm, y, weight, out=x), device)
        operations += 2 * 2.0 * TOKENS * rows * columns
        seconds += taken
    return operations / seconds


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _best(lambda: target.copy_(source), device)


def _attention_rate(device: torch.device, dtype: torch.dtype) -> float:
    q, k, v = (
        torch.randn(DOCUMENT, HEADS, HEAD_SIZE, device=device).to(dtype).requires_grad_() for _ in range(3)
    )
    starts = torch.tensor([0, DOCUMENT])
    ones = torch.ones_like(q)

    def both() -> None:
        torch.autograd.grad(attention(q, k, v, starts, scale=HEAD_SIZE**-0.5), (q, k, v), ones)

    seen = (1 + ATTENTION_BACKWARD) * 2.0 * HEADS * HEAD_SIZE * (DOCUMENT + ATTENTION_START)
    return seen * DOCUMENT / _best(both, device)


def _decoding_rate(device: torch.device) -> float:
    """Values of a weight in 4 bits that are read into 16 bits per second."""
    rows, columns = 1024, 2048
    weight = torch.randn(rows, columns, device=device)
    stored = encode_blocks(weight, "nf4", 64)
    return weight.numel() / _best(lambda: decode(stored, "nf4", 64, rows, columns, torch.bfloat16), device)


def _operation_seconds(device: torch.device) -> float:
    """Of one small operation inside a module, its node in the graph, and that node's backward."""
    parts = nn.Sequential(*(_Scaled() for _ in range(CHAIN)))
    x = torch.ones(8, 8, device=device, requires_grad=True)

    def chain() -> None:
        torch.autograd.grad(parts(x).sum(), x)

    wait = THREADS_WAIT if device.type == "cpu" and torch.get_num_threads() > 1 else 1.0
    return wait * _best(chain, device) / (2 * CHAIN)


class _Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Scaling.apply(x)  # type: ignore[no-untyped-call]
        return result


class _Scaling(torch.autograd.Function):
    """The least that a node of ours does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 1.01

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01 if len(ctx.saved_tensors) else grad


def _disk_rate(folder: Path) -> float:
    """Of reading a file back whose pages the system was asked to forget; a usual disk's where it may not."""
    path = folder / f".read-{secrets.token_hex(4)}"
    try:
        path.write_bytes(os.urandom(READ))
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while os.read(descriptor, 2**22):
                pass
            return READ / (time.perf_counter() - started)
        finally:
            os.close(descriptor)
    except OSError:
        return DISK_READ
    finally:
        path.unlink(missing_ok=True)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Fewest seconds of a call, after one to warm up."""
    action()
    best, spent = float("inf"), 0.0
    for number in range(TRIES):
        if number >= 2 and spent > SECONDS:
            break
        _finish(device)
        started = time.perf_counter()
        action()
        _finish(device)
        taken = time.perf_counter() - started
        best, spent = min(best, taken), spent + taken
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
