"""Models made ready for training on a frozen base: frozen, widened, activations recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graftlm.quant.convert import is_quantised, quantised_layers
from graftlm.quant.facts import is_packed

KEEPS_ITS_DTYPES = ("gptq", "aqlm", "eetq", "torchao", "hqq")
"""Ways of quantising whose other parameters belong to their kernels and stay as they are."""


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a model, widen what is not quantised to float32, and recompute activations of a quantised one.

    The model itself is changed and returned, as in PEFT. `auto_clear_cache` frees what this left on a GPU.

    A base that Graft quantised keeps its bfloat16: norms compute in float32 there anyway, and embeddings and
    head would take twice their memory. PEFT cannot adapt such a base; on what it can, this does as PEFT does.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    narrow = _widened_types(model)
    packed = {id(module._parameters.get("weight")) for module in model.modules() if is_packed(module)}
    for parameter in model.parameters():
        if parameter.dtype in narrow and id(parameter) not in packed:
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing and is_quantised(model):
        enable_activation_checkpointing(model, gradient_checkpointing_kwargs)
    return model


def _widened_types(model: nn.Module) -> tuple[torch.dtype, ...]:
    if getattr(model, "quantization_method", None) in KEEPS_ITS_DTYPES:
        return ()
    if quantised_layers(model):
        return (torch.float16,)  # gradients leave its range
    return (torch.float16, torch.bfloat16)


def enable_activation_checkpointing(
    model: nn.Module, kwargs: dict[str, Any] | None = None, **options: Any
) -> None:
    """Recompute activations in the backward pass, with gradients that reach adapters on a frozen base."""
    base: Any = model
    if hasattr(base, "activation_checkpointing_enable"):
        names = {"gradient_checkpointing_kwargs": "activation_checkpointing_kwargs"}
        options = {names.get(key, key): value for key, value in options.items()}
        options.setdefault("activation_checkpointing_kwargs", kwargs)
        base.activation_checkpointing_enable(**options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **options)
    base.enable_input_require_grads()
