"""Which operators Triton computes on CUDA, and what runs where it cannot: the definition, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor

from graftlm.core.notices import notice

Form = Callable[..., Any]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _forms() -> Mapping[str, Form] | None:
    """Triton's, by operator; None (and a notice) where it is not installed."""
    try:
        from graftlm.kernels.triton import cross_entropy, dropout, fp8, gating, low_rank, norms, rotary
    except ImportError:
        notice(
            "Norms, gates, adapters and cross-entropy run in plain torch, in several passes: triton is not "
            "installed. pip install 'graftlm[gpu]'"
        )
        return None
    return {
        "rms_norm": norms.rms_norm,
        "rms_norm_backward": norms.rms_norm_backward,
        "gated_silu": gating.gated_silu,
        "gated_silu_backward": gating.gated_silu_backward,
        "low_rank_into": low_rank.low_rank_into,
        "losses_and_gradient_": cross_entropy.losses_and_gradient_,
        "dropped": dropout.dropped,
        "add_dropped": dropout.add_dropped,
        "rope": rotary.rope,
        "rows_in_fp8": fp8.rows_in_fp8,
    }


def triton_form(name: str, *tensors: Tensor) -> Form | None:
    """Triton's form of that name for these tensors, or None where the definition must run: no Triton, numbers
    that it does not compute with (float64), rows too wide for its registers."""
    if not all(tensor.dtype in _DTYPES for tensor in tensors):
        return None
    if name.startswith("rms_norm") and any(tensor.shape[-1] > 2**16 for tensor in tensors):
        return None
    forms = _forms()
    return None if forms is None else partial(_on_its_device, forms[name], tensors[0])


def _on_its_device(form: Form, where: Tensor, *args: Any) -> Any:
    """A layer may lie on another device than the current one."""
    with torch.cuda.device_of(where):
        return form(*args)


def accelerated(name: str, definition: Form) -> Form:
    """The operator on CUDA: Triton's form where it fits, the `definition` otherwise."""

    @wraps(definition)
    def run(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        form = triton_form(name, *tensors)
        return definition(*args) if form is None else form(*map(rows_in_order, args))

    return run


def rows_in_order(value: Any) -> Any:
    """A tensor whose rows are each contiguous, copied if they are not; anything else as it is."""
    is_scattered = isinstance(value, Tensor) and value.dim() > 0 and value.stride(-1) != 1
    return value.contiguous() if is_scattered else value
