"""How much memory a run took, and how much is left."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_before_resets: dict[str, int] = {}
"""Highest peak by type of device that `reset_peak` has wiped out of the system's own count."""


def peak_bytes(device: torch.device) -> int:
    """Most memory this process has used so far: allocated on a GPU, resident for a CPU run."""
    return max(_before_resets.get(device.type, 0), peak_since_reset(device))


def peak_since_reset(device: torch.device) -> int:
    """The same since `reset_peak`, or since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes()


def reset_peak(device: torch.device) -> bool:
    """Begin to count the peak afresh; False where the system does not let a process do that.

    On Linux this also resets what other readers of this process's high-water mark see.
    """
    _before_resets[device.type] = peak_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return False
    try:
        return os.write(descriptor, b"5") == 1  # proc(5): the peak becomes what is resident now
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _peak_resident_bytes() -> int:
    """What the system calls the high-water mark. On Linux that of this program: `getrusage` begins with the
    mark of the process that started it."""
    if sys.platform == "win32":
        return 0  # not told without another package
    if sys.platform == "linux":
        with contextlib.suppress(OSError, StopIteration):
            lines = _STATUS.read_text(encoding="ascii").splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
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
