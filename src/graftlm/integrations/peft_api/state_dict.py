"""The tensors of one adapter as a dict with PEFT's keys, and adapters inside plain models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from graftlm.core.errors import AdapterError
from graftlm.formats.layout import FOLDER, adapter_tensors, fill
from graftlm.formats.peft_keys import clean_key
from graftlm.integrations.peft_api.configs import PeftConfig
from graftlm.integrations.peft_api.meaning import method_config
from graftlm.integrations.peft_api.starts import draw_as_in_peft
from graftlm.methods.adapter_set import AdapterSet, ParameterType
from graftlm.methods.attach import adapters_of, attach, attach_folder
from graftlm.models.attach import start_from_originals, taken_off_on_error, without_loftq


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> nn.Module:
    """Attach an adapter to a model and return that very model, without a wrapper around it.

    `low_cpu_mem_usage` is accepted: adapters are made in place here, and nothing is made twice.

    Raises:
        ConfigError, TargetError, AdapterError: the model is untouched.
    """
    make_adapter(model, peft_config, adapter_name)
    return model


def make_adapter(
    model: nn.Module, config: PeftConfig, name: str, *, dtype: ParameterType = "float32"
) -> AdapterSet:
    """A new adapter on `model`: active and trainable if it is the first; values drawn as PEFT draws them."""
    state = torch.get_rng_state()
    wanted, loftq = without_loftq(method_config(config, model))
    adapters = attach(model, wanted, name, storage=FOLDER, dtype=dtype)
    draw_as_in_peft(adapters, name, state)
    if loftq is not None:
        with taken_off_on_error(adapters, name):
            start_from_originals(adapters, name, loftq)
    if config.inference_mode:
        adapters.train_only([other for other in adapters.trainable if other != name])
    return adapters


def read_adapter(model: nn.Module, folder: Path, name: str, *, widen: bool = True) -> AdapterSet:
    """A saved adapter on `model`: active and trainable if it is the first; in float32 or the base's dtype."""
    state = torch.get_rng_state()
    adapters = attach_folder(model, folder, name, storage=FOLDER)
    draw_as_in_peft(adapters, name, state, keep=False)
    if not widen:
        for part in adapters.parts(name).values():
            part.to(next(model.parameters()).dtype)
    return adapters


def adapters_in(model: nn.Module) -> AdapterSet:
    """The adapters of a model or of a `PeftModel`.

    Raises:
        AdapterError: it has none.
    """
    get_base_model = getattr(model, "get_base_model", None)
    adapters = adapters_of(get_base_model() if callable(get_base_model) else model)
    if adapters is None:
        raise AdapterError(
            "This model has no adapters.",
            meaning="They were merged or unloaded, or never attached.",
            fix="Wrap it first: get_peft_model(model, config).",
        )
    return adapters


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Any = None, adapter_name: str = "default", **options: Any
) -> dict[str, Tensor]:
    """The tensors of one adapter under the keys that a file has, on the CPU.

    `state_dict` and options are accepted and not needed: an adapter knows its own tensors.
    """
    return adapter_tensors(adapters_in(model), adapter_name)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    **options: Any,
) -> _IncompatibleKeys:
    """Put tensors by their keys into an adapter that exists.

    Raises:
        FormatError: a tensor is missing, unexpected or of another shape; nothing was put. PEFT returns their
            names instead, and goes on.
    """
    tensors = {clean_key(key): value for key, value in peft_model_state_dict.items()}
    fill(adapters_in(model), adapter_name, tensors, "The state dict", strict=True)
    return _IncompatibleKeys(missing_keys=[], unexpected_keys=[])
