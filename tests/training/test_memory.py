"""Figures about memory."""

from __future__ import annotations

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
