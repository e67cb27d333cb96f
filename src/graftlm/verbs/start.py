"""Attaching the adapter of a run; one that begins from data sees the first training batches before."""

from __future__ import annotations

from torch import Tensor, nn

from graftlm.data.batches import Batch
from graftlm.data.forms import for_attention
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.starts.eva import eva_start
from graftlm.models.attach import attach_from_base
from graftlm.objectives.sft import attention_of
from graftlm.quant.facts import device_of, dtype_of
from graftlm.training.interfaces import BatchSource

BATCHES = 16
"""Micro-batches of the first epoch that are looked at, at most."""


def attach_started(
    model: nn.Module, config: MethodConfig, name: str, batches: BatchSource[Batch]
) -> AdapterSet:
    """The adapter of `config`, at its start; the same data and seed give the same start."""
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        return attach_from_base(model, config, name)
    count = min(BATCHES, batches.count(0))
    start = eva_start(model, config, [_arguments(model, batches.batch(0, index)) for index in range(count)])
    adapters = attach(model, start.config, name, storage=FOLDER)
    start.apply(adapters, name)
    return adapters


def _arguments(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What the model's forward takes, with labels."""
    ready = for_attention(batch, attention_of(model), dtype_of(model))
    device = device_of(model)
    return {key: value.to(device) for key, value in {**ready.inputs, "labels": ready.labels}.items()}
