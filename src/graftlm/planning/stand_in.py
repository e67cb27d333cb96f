"""A base with its adapter as a run would have them, of tensors without values: any size in no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.models.heads import with_head
from graftlm.planning.base_facts import BaseFacts, empty_model
from graftlm.quant.convert import packed_layer, quantisable
from graftlm.quant.frozen import PLAIN
from graftlm.quant.packed import PackedWeight, layout
from graftlm.quant.scheme import Scheme

NAME = "default"
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers"),
)
"""How configs call the number of their layers."""

PLAIN.add(FakeTensor)


def base_of(facts: BaseFacts, scheme: Scheme | None, dtype: torch.dtype, *, layers: int | None = None) -> Any:
    """The base on the meta device, its linear layers stored in `scheme`; with fewer layers, if asked."""
    config = facts.config if layers is None else shallow(facts.config, layers)
    model = empty_model(config, facts.name, facts.ending, dtype)
    if scheme is not None:
        for path, module in quantisable(model).items():
            model.set_submodule(path, packed_layer(module, _packed(module, scheme)))
    return model


def with_adapter(model: Any, config: MethodConfig) -> AdapterSet:
    """The adapter of a recipe on a base without values.

    Starts that are computed from data or weights have the shapes of the plain one.

    Raises:
        TargetError, ConfigError: the config does not fit the model.
    """
    if isinstance(config, LoraConfig):
        config = config.replace(init_lora_weights=True, loftq_config=None)
    return attach(model, with_head(config, model), NAME, storage=FOLDER)


def shallow(config: Any, layers: int) -> Any:
    """The config of a model of fewer layers of the same kinds."""
    own = copy.deepcopy(config)
    for part in {id(part): part for part in (own, own.get_text_config())}.values():
        for name in _DEPTHS:
            if isinstance(vars(part).get(name), int):
                setattr(part, name, min(layers, getattr(part, name)))
        kinds = vars(part).get("layer_types")
        if kinds:
            part.layer_types = kinds[:layers]
    return own


def without_values(model: nn.Module, device: str = "cpu") -> None:
    """Every tensor of a model on the meta device becomes one that computes as if it were on `device`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = tensor.detach().to("meta")
            fake: Tensor = FakeTensor(mode, empty, torch.device(device))
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fake
        return made[id(tensor)]

    for module in model.modules():
        held: dict[str, Any] = {**module._parameters, **module._buffers}
        for name, tensor in held.items():
            if tensor is not None:
                place: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
                place[name] = of(tensor)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once."""
    yield from model.parameters()
    yield from model.buffers()


def _packed(module: nn.Module, scheme: Scheme) -> PackedWeight:
    weight = module.get_parameter("weight")
    rows, columns = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in layout(scheme, (rows, columns)).items()
    }
    return PackedWeight(scheme, (rows, columns), MappingProxyType(tensors))
