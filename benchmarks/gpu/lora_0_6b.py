"""LoRA on the shape of Qwen3 0.6B: a model so small that the host decides.

    python benchmarks/gpu/lora_0_6b.py [--keep]        one GPU of 24 GB or more
    python benchmarks/gpu/lora_0_6b.py --smoke         a tiny model on the CPU

Weights are random and drawn on the device, the same for every side; rows are full: 2,048 tokens each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.case import Case
from harness.gpu import main
from harness.row import Row
from harness.sides.registry import CUDA_PEERS, GRAFT_RECORDED

ROWS = (
    Row(
        Case(
            "gpu-lora-0.6b",
            shape="qwen3-0.6b",
            rows=4,
            length=2048,
            steps=40,
            warm_up=8,
            device="cuda",
            on_device=True,
        ),
        CUDA_PEERS,
        (GRAFT_RECORDED,),
    ),
)


if __name__ == "__main__":
    main(__file__, __doc__, ROWS, "120,000 tokens/s on one H200; 239,000 is the bound")
