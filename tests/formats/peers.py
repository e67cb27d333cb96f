"""What the comparisons with PEFT share."""

from __future__ import annotations

from typing import Any

import torch


def noisy(model: Any, size: float = 0.1) -> Any:
    """The model with noise on every trained number, as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model
