"""QLoRA (NF4) on the shape of Llama 3 70B on one GPU.

    python benchmarks/gpu/qlora_70b.py [--keep]        one GPU of 80 GB or more
    python benchmarks/gpu/qlora_70b.py --smoke         a tiny model on the CPU

Weights are random and drawn on the device, the same for every side; rows are full: 2,048 tokens each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.case import Case
from harness.gpu import main
from harness.row import Row
from harness.sides.registry import BITSANDBYTES_FASTEST

CASE = Case(
    "gpu-qlora-70b",
    shape="70b",
    rows=1,
    length=2048,
    steps=8,
    device="cuda",
    on_device=True,
    quantization="nf4",
)
ROWS = (Row(CASE, (BITSANDBYTES_FASTEST,)),)


if __name__ == "__main__":
    main(__file__, __doc__, ROWS, "2,200 tokens/s on one H200; 2,700 is the bound")
