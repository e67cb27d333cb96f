"""Figures about memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from graftlm.training.memory import free_bytes, peak_bytes


def test_the_peak_follows_what_is_used() -> None:
    cpu = torch.device("cpu")
    before = peak_bytes(cpu)
    block = torch.ones(1 << 28, dtype=torch.uint8)
    after = peak_bytes(cpu)
    assert before > 2**20 and after >= before
    assert after >= block.numel()
    assert free_bytes(cpu) > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="who starts a process leaves it nothing elsewhere")
def test_the_peak_of_who_started_the_process_is_not_its_own() -> None:
    child = "import torch, graftlm.training.memory as m; print(m.peak_bytes(torch.device('cpu')))"
    code = (
        "import subprocess, sys\n"
        f"block = bytearray({2**30})\n"
        f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < 2**30
