"""LoRA on the shape of Llama 3.1 8B in bfloat16, rank 16 on every linear layer: ours and the peers.

    python benchmarks/gpu/lora_8b.py [--keep]        one GPU of 80 GB or more
    python benchmarks/gpu/lora_8b.py --smoke         a tiny model on the CPU

Weights are random and drawn on the device, the same for every side; rows are full: 2,048 tokens each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.case import Case
from harness.gpu import main
from harness.row import Row
from harness.sides.registry import CUDA_PEERS

ROWS = (
    Row(
        Case(
            "gpu-lora-8b", shape="8b", rows=2, length=2048, steps=24, warm_up=4, device="cuda", on_device=True
        ),
        CUDA_PEERS,
    ),
)


if __name__ == "__main__":
    main(
        __file__,
        __doc__,
        ROWS,
        "18,000 tokens/s on one H200, 20,000 to 21,000 if all goes well; 24,300 is the bound",
    )
