"""`get_model_status`: the state of all adapters of a model at a glance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graftlm.integrations.peft_api.state_dict import adapters_in


@dataclass(frozen=True)
class ModelStatus:
    """What PEFT's status has. Nothing can be "irregular" here: one owner keeps the state of all layers."""

    base_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    """Modules that have an adapter."""
    enabled: bool
    """Whether any adapter acts."""
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_model_status(model: nn.Module) -> ModelStatus:
    """The state of the adapters of a model, or of a `PeftModel`.

    Raises:
        AdapterError: it has none.
    """
    adapters = adapters_in(model)
    trainable, total = adapters.count_parameters()
    names = sorted(adapters.names)
    return ModelStatus(
        base_model_type=type(adapters.model).__name__,
        peft_types={name: adapters.config(name).peft_type for name in names},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len({path for name in names for path in adapters.parts(name)}),
        enabled=bool(adapters.active),
        active_adapters=list(adapters.active),
        merged_adapters=list(adapters.merged),
        requires_grad={name: name in adapters.trainable for name in names},
        available_adapters=names,
        devices={name: sorted({p.device.type for p in adapters.parameters(name)}) for name in names},
    )
