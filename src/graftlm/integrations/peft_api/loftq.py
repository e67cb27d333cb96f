"""PEFT's function that gives a LoRA on a quantised base the start of LoftQ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.integrations.peft_api.state_dict import adapters_in
from graftlm.methods.starts.initialise import LoftQConfig
from graftlm.models.attach import start_from_originals


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Start a LoRA again, from what quantising its base lost.

    The correction is divided by the adapter's scaling, so that it is right at any `lora_alpha`; that of PEFT
    is right where `lora_alpha` equals `r`.

    Args:
        model_path: file, folder or hub id of the weights before quantising; by default what the config names.
        callback: asked after every layer with the model and the layer's path; False takes its new start back.

    Raises:
        ModelError, ConfigError: there are no such weights, or they do not fit.
    """
    accepts = None if callback is None else lambda path: bool(callback(peft_model, path))
    adapters = adapters_in(peft_model)
    start_from_originals(adapters, adapter_name, LoftQConfig(), source=model_path, accepts=accepts)
