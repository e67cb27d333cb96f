"""Adapters trained by scripts that keep gradients from some layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from case import Case, Diagnosed
from peft import LoraConfig, get_peft_model

from graftlm.models.load import load_model
from graftlm.models.sprout import sprout_folder

STEPS = 5
TARGETS = ["q_proj", "v_proj", "up_proj"]


def _trained(folder: Path, prepare: Callable[[Any], None]) -> Diagnosed:
    """A few steps of a plain loop around a PEFT model, as scripts have it."""
    torch.manual_seed(0)
    model, tokenizer = load_model(str(sprout_folder()), dtype="float32")
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))
    prepare(wrapped)
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    wrapped.train()
    for _ in range(STEPS):
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(folder / "adapter")
    return Diagnosed(folder / "adapter", base=str(sprout_folder()))


def _freeze_lower(model: Any) -> None:
    """Meant for the base, which is frozen anyway; the adapters there go with it."""
    for name, parameter in model.named_parameters():
        if ".layers.0." in name or ".layers.1." in name:
            parameter.requires_grad = False


def _detach_in_the_middle(model: Any) -> None:
    """As in code that was written for a frozen lower half."""
    layer = model.get_submodule("base_model.model.model.layers.2")
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))


def _as_it_is(model: Any) -> None:
    """Every adapter is trained."""


CASES = (
    Case(
        "D12",
        "frozen-again",
        lambda folder: _trained(folder, _freeze_lower),
        lambda folder: _trained(folder, _as_it_is),
    ),
    Case(
        "D12",
        "graph-cut",
        lambda folder: _trained(folder, _detach_in_the_middle),
        lambda folder: _trained(folder, _as_it_is),
    ),
)
