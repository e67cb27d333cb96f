"""How much memory a run took, and whether activations have to be recomputed to fit."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

# Values kept per token and layer for the backward pass of a frozen pre-norm transformer layer with
# adapters, in units of the hidden size: inputs of norms, projections and attention, and the residual.
_HIDDEN_VALUES = 12
_INTERMEDIATE_VALUES = 4  # gate, up, their product and the activation, in units of the MLP width
_SAFETY = 0.8  # of the free memory; allocators fragment


@dataclass(frozen=True)
class RecomputeChoice:
    """Whether to recompute activations in the backward pass, with the figures behind it."""

    policy: Literal["keep", "recompute"]
    activation_bytes: int
    free_bytes: int
    why: str


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on a GPU, resident for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        return 0  # not told without another package
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        known = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in known else 0


def activation_bytes(
    *, tokens: int, hidden_size: int, intermediate_size: int, num_layers: int, bytes_per_value: int
) -> int:
    """Activations one micro-batch keeps for its backward pass; an estimate, good to about a factor 1.5.

    >>> activation_bytes(tokens=1024, hidden_size=64, intermediate_size=256, num_layers=2, bytes_per_value=4)
    14680064
    """
    per_layer = _HIDDEN_VALUES * hidden_size + _INTERMEDIATE_VALUES * intermediate_size
    return tokens * num_layers * per_layer * bytes_per_value


def choose_recompute(needed: int, free: int) -> RecomputeChoice:
    """Recompute only when keeping would not fit: it costs about a third more time.

    >>> choose_recompute(needed=10**9, free=16 * 10**9).policy
    'keep'
    """
    fits = needed <= _SAFETY * free
    relation = "fit in" if fits else "do not fit in"
    return RecomputeChoice(
        "keep" if fits else "recompute",
        needed,
        free,
        f"activations of about {needed / 2**20:,.0f} MiB {relation} {_SAFETY:.0%} of "
        f"{free / 2**20:,.0f} MiB of free memory",
    )
