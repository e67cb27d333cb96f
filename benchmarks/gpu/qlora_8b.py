"""QLoRA (NF4, double quantisation) on the shape of Llama 3.1 8B: ours, the peers, our own 16-bit LoRA.

    python benchmarks/gpu/qlora_8b.py [--keep]        one GPU of 24 GB or more
    python benchmarks/gpu/qlora_8b.py --smoke         a tiny model on the CPU

Weights are random and drawn on the device, the same for every side; rows are full: 2,048 tokens each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.case import Case
from harness.gpu import main
from harness.row import Row
from harness.sides.registry import CUDA_FOUR_BIT_PEERS, GRAFT_DENSE

CASE = Case(
    "gpu-qlora-8b",
    shape="8b",
    rows=2,
    length=2048,
    steps=24,
    warm_up=4,
    device="cuda",
    on_device=True,
    quantization="nf4",
)
ROWS = (Row(CASE, CUDA_FOUR_BIT_PEERS, (GRAFT_DENSE,)),)


if __name__ == "__main__":
    main(__file__, __doc__, ROWS, "17,000 tokens/s on one H200")
