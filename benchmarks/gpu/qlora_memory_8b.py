"""Least memory of QLoRA on the shape of Llama 3.1 8B: one row of 2,048 tokens, everything recomputed.

    python benchmarks/gpu/qlora_memory_8b.py [--keep]        one GPU of 12 GB or more
    python benchmarks/gpu/qlora_memory_8b.py --smoke         a tiny model on the CPU

Weights are random and drawn on the device, the same for every side; rows are full: 2,048 tokens each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.case import Case
from harness.gpu import main
from harness.row import Row
from harness.sides.registry import CUDA_FOUR_BIT_PEERS

CASE = Case(
    "gpu-qlora-memory-8b",
    shape="8b",
    rows=1,
    length=2048,
    steps=6,
    device="cuda",
    on_device=True,
    quantization="nf4",
    recompute="everything",
)
ROWS = (Row(CASE, CUDA_FOUR_BIT_PEERS), Row(CASE.but(row="gpu-qlora-memory-8b-offload", recompute="offload")))


if __name__ == "__main__":
    main(__file__, __doc__, ROWS, "at most 6.5 GiB allocated, weights included")
