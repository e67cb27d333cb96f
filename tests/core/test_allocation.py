"""Freed memory is reused inside, and given back at the end."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, resource
from contextlib import nullcontext
from graftlm.core.allocation import freed_memory_kept

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        block = libc.malloc(64 * 2**20)
        libc.memset(block, 1, 64 * 2**20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

plain = faults()
with freed_memory_kept() as kept:
    assert kept
    faults()
    inside, held = faults(), resident()
print(plain, inside, held - resident(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of Linux's C library")
def test_pages_are_faulted_in_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    plain, inside, returned, after = map(int, done.stdout.split())
    pages = 8 * 64 * 2**20 // resource.getpagesize()
    assert plain > 0.9 * pages
    assert inside < 0.01 * pages
    assert returned > 60 * 2**20
    assert after > 0.9 * pages
