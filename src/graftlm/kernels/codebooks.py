"""The number formats of packed weights: what each code of 4 or 8 bits stands for.

NF4 is the normal float of QLoRA (arXiv 2305.14314, appendix E), FP4 a float with two exponent bits, and the
dynamic map holds the scales of scales (arXiv 1511.04561). Tables are those of bitsandbytes, to the bit.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_FP4_POSITIVE = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
)
FP4 = (*_FP4_POSITIVE, *(0.0 - value for value in _FP4_POSITIVE))

CODEBOOKS = {"nf4": NF4, "fp4": FP4}
"""Values of the 16 codes, by kind."""


@cache
def codebook(kind: str, device: torch.device | str = "cpu") -> Tensor:
    """The float32 values of the codes of a 4-bit kind, [16]."""
    return torch.tensor(CODEBOOKS[kind], dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the signed dynamic 8-bit float that quantised scales are stored in, ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
