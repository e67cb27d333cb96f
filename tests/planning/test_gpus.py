"""The table of GPUs: its figures hang together, and cards are found however they are written."""

from __future__ import annotations

import pytest

from graftlm.core.errors import ConfigError
from graftlm.planning.gpus import GIB, GPUS, GpuFacts, gpu_named


@pytest.mark.parametrize("card", GPUS.values(), ids=list(GPUS))
def test_figures_hang_together(card: GpuFacts) -> None:
    assert 4 < card.gib < 300
    assert 200 < card.bandwidth < 10_000
    assert 0 < card.float32 <= card.float16, "matrix units are not slower than the others"
    assert card.bfloat16 in (0, card.float16), "16 bits are 16 bits where there are both"
    assert card.fp8 == 0 or 1.9 < card.fp8 / card.float16 < 2.1, "8 bits are twice as fast"
    machine = card.machine
    assert machine.device == "cuda"
    assert machine.memory_bytes == round(card.gib * GIB)
    assert not machine.rates.is_measured
    assert "not measured here" in machine.source
    assert 0 < machine.idle_bytes < machine.memory_bytes
    assert all(rate > 0 for rate in machine.rates.matrix.values())
    assert bool(machine.notes) == (card.bfloat16 == 0)


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("rtx4090", "rtx4090"), ("RTX 4090", "rtx4090"), ("4090", "rtx4090"), ("GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("a100", "a100"), ("A100-80GB", "a100"),
        ("A100 40GB", "a100-40gb"),
        ("NVIDIA L4", "l4"), ("Tesla T4", "t4"), ("h100 sxm5", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
    ],
)  # fmt: skip
def test_a_card_is_found_however_it_is_written(written: str, key: str) -> None:
    assert gpu_named(written) is GPUS[key]


def test_an_unknown_card_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rtx4090'") as refused:
        gpu_named("rtx 4900")
    assert "rtx3060" in refused.value.meaning
    assert "--machine" in refused.value.fix
