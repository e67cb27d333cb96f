"""Layers of bitsandbytes on a CPU: kept in the layout that gradients pass through.

On processors with bfloat16 products, bitsandbytes rearranges a 4-bit weight at the first call in evaluation
mode, for a product that has no backward. A layer that was evaluated once then gives its input no gradient in
training, and whatever lies before it learns nothing, or the wrong thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from graftlm.quant.foreign import is_foreign

SWITCH = "support_avx512bf16_for_cpu"
"""Attribute of `Linear4bit` that lets it rearrange its weight."""


def keep_differentiable(model: nn.Module) -> Callable[[], None]:
    """Take back rearrangements and allow no further ones; returns what allows them again."""
    found: list[Any] = [m for m in model.modules() if is_foreign(m) and getattr(m, SWITCH, False)]
    for layer in found:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            layer.state_dict()  # which bitsandbytes gives, and leaves behind, in the common layout
        setattr(layer, SWITCH, False)

    def allow() -> None:
        for layer in found:
            setattr(layer, SWITCH, True)

    return allow
