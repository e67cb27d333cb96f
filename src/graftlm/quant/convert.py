"""Which layers of a model are stored in few bits, and turning them into that and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import ModelError
from graftlm.quant.embedding import TiedHead
from graftlm.quant.foreign import is_foreign
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import PackedWeight, encode
from graftlm.quant.scheme import Scheme
from graftlm.quant.weights import WeightHandle

_SAME_ARITHMETIC = frozenset(("FalconLinear",))
"""Layers of `transformers` that write the arithmetic of `nn.Linear` out."""
_ROUTERS = frozenset(("gate", "router", "wg", "shared_expert_gate"))
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Every layer of ours with a packed weight, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer is stored in few bits, by us, bitsandbytes or another library."""
    return _quantised_by(model) is not None


def quantise(model: nn.Module, scheme: Scheme, *, skip: Sequence[str] = ()) -> list[str]:
    """Store the weight of every layer of `quantisable(model, skip=skip)` in few bits, in place, one by one.

    Biases stay the parameters they are. Returns the paths of the layers.

    Raises:
        ModelError: a weight holds NaN or infinity, or the model is quantised already.
    """
    require_dense(model)
    layers = quantisable(model, skip=skip)
    for path in list(layers):
        module = layers.pop(path)
        weight = dense_weight(module)
        packed = encode(weight, scheme, name=f"{path}.weight")
        model.set_submodule(path, packed_layer(module, packed))
    return list(quantised_layers(model))


def packed_layer(module: nn.Module, packed: PackedWeight) -> QuantisedLinear:
    """What stands in for an `nn.Linear` or `Conv1D` whose own weight may be on the meta device: with the
    same bias, dtype and mode."""
    layer = QuantisedLinear(packed, _bias_of(module), module.get_parameter("weight").dtype)
    layer.made_from = Conv1D if isinstance(module, Conv1D) else nn.Linear
    return layer.train(module.training)


@torch.no_grad()
def dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn every packed layer, ours or of bitsandbytes, into the dense kind that it was made from.

    Weights are decoded once, to `dtype`. A dense one that a merge put in the place of a packed one stays.
    """
    tables: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        handle = WeightHandle(module)
        if handle.is_packed:
            held = handle.held()["weight"]
            weight = handle.packed.decode(dtype) if held is None else held.detach().to(dtype)
            dense = _dense_layer(handle.made_from, weight, _bias_of(module))
            model.set_submodule(path, dense.train(module.training))
            tables[id(module)] = dense.get_parameter("weight")
    for path, module in list(model.named_modules()):
        if isinstance(module, TiedHead):
            table = tables[id(module.embedding)]
            dense = _dense_layer(nn.Linear, table, module.bias)
            dense.register_parameter("weight", table)
            model.set_submodule(path, dense.train(module.training))
    forget_quantisation(model)


def forget_quantisation(model: Any) -> None:
    """Take back what `transformers` notes on a quantised model and its config: it is saved as dense."""
    config = getattr(model, "config", None)
    noted = ((config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method"))
    for owner, name in noted:
        if name in getattr(owner, "__dict__", {}):
            delattr(owner, name)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, name, False):
            setattr(model, name, False)


def _dense_layer(kind: type[nn.Module], weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Module:
    """A layer of that kind with this weight [out, in]."""
    rows, columns = weight.shape
    layer: nn.Module
    with torch.device("meta"):
        if kind is nn.Embedding:
            layer = nn.Embedding(rows, columns)
        else:
            layer = Conv1D(rows, columns) if kind is Conv1D else nn.Linear(columns, rows, bias=False)
    weight = weight.t().contiguous() if kind is Conv1D else weight
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if kind is not nn.Embedding:
        layer.register_parameter("bias", bias)
    return layer


def quantisable(model: nn.Module, *, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The linear layers (`nn.Linear`, `Conv1D`) of the body of a model, by path.

    Not among them: output and classification heads (whatever is outside of `model.base_model`), layers that
    share their weight with another module, the last layer of a model that ends in a linear one, layers that
    their architecture keeps in float32, routers of experts, and `skip`: paths, parts of paths or names.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> list(quantisable(model, skip=["2"]))
    ['0']
    """
    left_out = (*skip, *_heads(model), *_tied(model), *_kept_in_float32(model))
    counts = _expert_counts(model)
    return {
        path: module
        for path, module in model.named_modules()
        if _is_linear(module)
        and not any(matches(path, pattern) for pattern in left_out)
        and not _is_router(path, module, counts)
    }


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern names this module or one around it: a path from the root, or whole names within it.

    >>> matches("model.layers.1.mlp", "layers.1"), matches("model.layers.11.mlp", "layers.1")
    (True, False)
    """
    return f".{pattern}." in f".{path}."


def require_dense(model: nn.Module) -> None:
    """Refuse a model with layers in few bits.

    Raises:
        ModelError: there is one.
    """
    found = _quantised_by(model)
    if found is not None:
        raise ModelError(
            f"The model is quantised already ({found}).",
            meaning="Quantising rounded weights once more adds a second error to the first.",
            fix="Load the 16-bit model (quantization='none') and quantise that.",
        )


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of an `nn.Linear` or `Conv1D` as [out, in], detached; no copy."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def _is_linear(module: nn.Module) -> bool:
    """Whether `x W^T + b` is all that the module computes, and nothing but the module reads its weight."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # read by the attention of torch around it
        return False
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or isinstance(module, Conv1D) or type(module).__name__ in _SAME_ARITHMETIC


def _bias_of(module: nn.Module) -> nn.Parameter | None:
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias


def _quantised_by(model: nn.Module) -> str | None:
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            return f"{path} is stored as {module.scheme.kind}"
        if is_foreign(module):
            return f"{path} is a {type(module).__name__} of bitsandbytes"
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None and getattr(model, "is_quantized", True):
        return "its configuration names a quantization_config"
    return None


def _heads(model: nn.Module) -> Iterator[str]:
    """Modules outside of the base model, the output layer, and what holds the last parameter of all."""
    body: Any = getattr(model, "base_model", None)
    if body is not None and body is not model:
        inside = set(body.modules())
        yield from (path for path, module in model.named_modules() if module not in inside and path)
    yield from _paths_of(model, {id(_output_layer(model))})
    if hasattr(model, "config"):
        names = [name for name, _ in model.named_parameters()]
        yield from (name.rpartition(".")[0] for name in names[-1:])


def _output_layer(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    found = None if get is None else get()
    return found if isinstance(found, nn.Module) else None


def _tied(model: nn.Module) -> Iterator[str]:
    names: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or MappingProxyType({})
    yield from (name.removesuffix(".weight") for pair in names.items() for name in pair)
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    yield from _paths_of(model, {one for group in holders.values() if len(group) > 1 for one in group})


def _paths_of(model: nn.Module, modules: Iterable[int]) -> Iterator[str]:
    wanted = set(modules)
    return (path for path, module in model.named_modules(remove_duplicate=False) if id(module) in wanted)


def _kept_in_float32(model: nn.Module) -> Iterator[str]:
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        yield from getattr(model, attribute, None) or ()


def _expert_counts(model: nn.Module) -> frozenset[int]:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(config, name, None) for name in _EXPERT_COUNTS)
    return frozenset(count for count in found if isinstance(count, int))


def _is_router(path: str, module: nn.Module, counts: frozenset[int]) -> bool:
    """A layer that is named like a router and gives a number for each expert, or a single one."""
    return path.rpartition(".")[2] in _ROUTERS and dense_weight(module).shape[0] in {1, *counts}
