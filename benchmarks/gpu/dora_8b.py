"""DoRA beside LoRA on the shape of Llama 3.1 8B: what the method costs, ours and PEFT's.

    python benchmarks/gpu/dora_8b.py [--keep]        one GPU of 80 GB or more
    python benchmarks/gpu/dora_8b.py --smoke         a tiny model on the CPU

Weights are random and drawn on the device, the same for every side; rows are full: 2,048 tokens each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.case import Case
from harness.gpu import main
from harness.row import Row
from harness.sides.registry import CUDA_DORA_PEERS, GRAFT_LORA

CASE = Case(
    "gpu-dora-8b",
    shape="8b",
    method="dora",
    rows=2,
    length=2048,
    steps=16,
    warm_up=4,
    device="cuda",
    on_device=True,
)
ROWS = (Row(CASE, CUDA_DORA_PEERS, (GRAFT_LORA,)),)


if __name__ == "__main__":
    main(__file__, __doc__, ROWS, "at most 5 % slower than our LoRA")
