"""Layers that bitsandbytes quantised: read without a copy, or taken over as our own.

bitsandbytes is never imported here: a layer of its kind proves that it is there.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import ModelError
from graftlm.kernels.codebooks import codebook, dynamic_map
from graftlm.kernels.decoding import SCALE_BLOCK, by_blocks
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import PackedWeight
from graftlm.quant.scheme import Scheme


def is_foreign(module: nn.Module) -> bool:
    """Whether it is a `Linear4bit` or `Linear8bitLt` of bitsandbytes with a quantised weight."""
    kind = _kind(module)
    if kind == "Linear8bitLt":
        return module.get_parameter("weight").dtype == torch.int8
    return kind == "Linear4bit" and _state_of(module) is not None


def packed_of(module: nn.Module, *, name: str = "weight") -> PackedWeight:
    """The weight of a layer of bitsandbytes as ours; its tensors are shared, not copied.

    Raises:
        ModelError: not such a layer, or one in a format that is not read here; the error calls it `name`.
    """
    if not is_foreign(module):
        raise _unreadable(name, f"{type(module).__name__} holds no weight that bitsandbytes quantised")
    return _eight_bit(module, name) if _kind(module) == "Linear8bitLt" else _four_bit(module, name)


def adopt(model: nn.Module) -> list[str]:
    """Replace every layer of bitsandbytes by a `QuantisedLinear` on the same tensors; returns their paths."""
    found = {path: module for path, module in model.named_modules() if is_foreign(module)}
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float16)
    for path, module in found.items():
        bias = module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        dtype = floating if _kind(module) == "Linear8bitLt" else stands_for(module)
        ours = QuantisedLinear(packed_of(module, name=f"{path}.weight"), bias, dtype)
        ours.made_from = made_from(module)
        model.set_submodule(path, ours.train(module.training))
    return list(found)


def made_from(module: nn.Module) -> type[nn.Module]:
    """The kind of layer before it was quantised, where `transformers` noted it."""
    is_conv = getattr(module, "source_cls", None) is Conv1D
    return Conv1D if is_conv else nn.Linear


def stands_for(module: nn.Module) -> torch.dtype:
    """The dtype of the weight before it was quantised: 8-bit layers are always made from float16."""
    state = _state_of(module)
    dtype = torch.float16 if state is None else getattr(state, "original_dtype", state.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _kind(module: nn.Module) -> str | None:
    """The name of the class of bitsandbytes that it is an instance of."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("bitsandbytes.") and cls.__name__ in ("Linear4bit", "Linear8bitLt"):
            return cls.__name__
    return None


def _state_of(module: nn.Module) -> Any:
    """The `QuantState`; a parameter that was converted may have lost it while its layer still has it."""
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def _four_bit(module: nn.Module, name: str) -> PackedWeight:
    state: Any = _state_of(module)
    weight = module.get_parameter("weight").data
    if not torch.equal(state.code, codebook(state.quant_type, state.code.device)):
        raise _unreadable(name, f"has a map of codes that is not that of {state.quant_type}")
    rows, columns = state.shape
    scheme = Scheme(state.quant_type, double_quant=state.nested, block_size=state.blocksize)
    if getattr(state, "packing_format_for_cpu", False):
        parts = {"codes": _in_order(weight, rows, columns), "scales": state.absmax.t().float().flatten()}
        return PackedWeight(scheme, (rows, columns), MappingProxyType(parts))
    codes = weight.contiguous().view(torch.uint8).flatten()
    if not scheme.double_quant:
        parts = {"codes": codes, "scales": state.absmax.float()}
        return PackedWeight(scheme, (rows, columns), MappingProxyType(parts))
    inner = state.state2
    if inner.blocksize == SCALE_BLOCK and torch.equal(inner.code, dynamic_map(inner.code.device)):
        parts = {"scales": state.absmax, "scale_scales": inner.absmax, "scale_offset": state.offset}
        return PackedWeight(scheme, (rows, columns), MappingProxyType({"codes": codes, **parts}))
    plain = by_blocks(inner.code[state.absmax.int()], inner.absmax, inner.blocksize) + state.offset
    scheme = Scheme(scheme.kind, double_quant=False, block_size=scheme.block_size)
    return PackedWeight(scheme, (rows, columns), MappingProxyType({"codes": codes, "scales": plain}))


def _in_order(rearranged: Tensor, rows: int, columns: int) -> Tensor:
    """The codes by row. For inference on a CPU bitsandbytes puts 32 rows side by side (and rounds the scales
    to bfloat16): that is what its layer computes with from then on."""
    groups = rearranged.view(torch.uint8).reshape(-1, 32)
    codes = torch.cat([groups & 0xF, groups >> 4], dim=-1).view(rows // 32, columns // 2, 32, 2)
    pairs = codes.transpose(1, 2).reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _eight_bit(module: nn.Module, name: str) -> PackedWeight:
    weight: Any = module.weight
    state: Any = module.state
    scales = getattr(weight, "SCB", None)
    scales = state.SCB if scales is None else scales
    if scales is None:
        raise _unreadable(name, "has no scales (SCB)")
    rows, columns = weight.shape
    parts: dict[str, Tensor] = {"codes": weight.data, "scales": scales.float().flatten()}
    return PackedWeight(Scheme("int8"), (rows, columns), MappingProxyType(parts))


def _unreadable(name: str, what: str) -> ModelError:
    return ModelError(
        f"The weight {name} {what}.",
        meaning="Only 4-bit layers of NF4 or FP4 and 8-bit layers with scales by row are read.",
        fix="Load the model again, with quantization=... of Graft.",
    )
