"""LoRA on the shape of Llama 3.1 8B with products in FP8 (opt-in) beside our own bfloat16.

    python benchmarks/gpu/fp8_8b.py [--keep]        one GPU with FP8 (Hopper, Ada or newer), 48 GB or more
    python benchmarks/gpu/fp8_8b.py --smoke         a tiny model on the CPU

Weights are random and drawn on the device, the same for every side; rows are full: 2,048 tokens each.
FP8 rounds: losses may differ by what the tolerance of this row allows, and quality has a gate of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.case import Case
from harness.gpu import main
from harness.row import Row
from harness.sides.registry import GRAFT_DENSE

CASE = Case(
    "gpu-lora-8b-fp8",
    shape="8b",
    rows=2,
    length=2048,
    steps=24,
    warm_up=4,
    device="cuda",
    on_device=True,
    quantization="fp8-products",
)
ROWS = (Row(CASE, (), (GRAFT_DENSE,)),)


if __name__ == "__main__":
    main(__file__, __doc__, ROWS, "26,000 tokens/s on one H200; 38,000 is the bound")
