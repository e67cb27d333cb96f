"""Random tensors and errors relative to the size of what is summed."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(ours: Tensor, exact: Tensor, size: Tensor) -> float:
    """Error over `size`, the same sum with every term positive: rounding acts on terms, which may cancel."""
    ours, exact, size = (tensor.detach().double() for tensor in (ours, exact, size))
    return float((ours - exact).norm() / size.norm().clamp_min(1e-30))
