"""Figures about memory."""

from __future__ import annotations

import torch

from graftlm.training.memory import activation_bytes, choose_recompute, free_bytes, peak_bytes


def test_the_peak_follows_what_is_used() -> None:
    cpu = torch.device("cpu")
    before = peak_bytes(cpu)
    block = torch.ones(1 << 28, dtype=torch.uint8)
    after = peak_bytes(cpu)
    assert before > 2**20 and after >= before
    assert after >= block.numel()
    assert free_bytes(cpu) > 2**20


def test_recompute_only_when_keeping_does_not_fit() -> None:
    needed = activation_bytes(
        tokens=4096, hidden_size=4096, intermediate_size=11008, num_layers=32, bytes_per_value=2
    )
    assert choose_recompute(needed, 4 * needed).policy == "keep"
    choice = choose_recompute(needed, needed)
    assert choice.policy == "recompute" and "do not fit in 80%" in choice.why
