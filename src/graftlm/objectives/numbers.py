"""A base that computes no numbers is refused before anything is trained on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftlm.core.errors import ModelError
from graftlm.quant.facts import dtype_of


def require_numbers(logits: Tensor, model: nn.Module) -> None:
    """Refuse logits that are NaN or infinite.

    Raises:
        ModelError: they are.
    """
    if bool(torch.isfinite(logits).all()):
        return
    dtype = dtype_of(model)
    name = str(dtype).removeprefix("torch.")
    is_narrow = dtype == torch.float16
    raise ModelError(
        f"The base computes no numbers in {name}: its logits are NaN or infinite.",
        meaning="Values inside exceed 65,504, where float16 ends; the base was made for bfloat16."
        if is_narrow
        else "A weight of the base is damaged.",
        fix="Use model.dtype: bfloat16 (or float32)." if is_narrow else "Download or copy the base again.",
    )
