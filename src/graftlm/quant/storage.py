"""Packed weights under the names that bitsandbytes gives their tensors in a state dict or a file.

4 bits: `weight` uint8 [bytes, 1], `weight.absmax`, `weight.quant_map`, with double quantisation
`weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4`, a JSON text
as bytes. int8: `weight`, `SCB`, `weight_format`. fp8: `weight`, `weight_scale`; fp8_block: `weight`,
`weight_scale_inv`, as DeepSeek and the fine-grained FP8 of `transformers` have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from graftlm.core.errors import ModelError
from graftlm.kernels.codebooks import codebook, dynamic_map
from graftlm.kernels.decoding import SCALE_BLOCK, by_blocks
from graftlm.kernels.encoding import FLOAT8
from graftlm.quant.packed import PackedWeight, layout
from graftlm.quant.scheme import BLOCKS, Scheme

STATE = "weight.quant_state.bitsandbytes__"
SUFFIXES = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(f"{STATE}nf4", f"{STATE}fp4", "SCB", "weight_format", "weight_scale", "weight_scale_inv"),
)
"""Every name that a tensor of a packed weight may have behind the path of its layer."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
_LONGEST_STATE = 4096


def to_tensors(packed: PackedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight by the names that follow the path of its layer; no copy of the large ones.

    Args:
        dtype: what the weight is decoded to, where the format has a place for it.
    """
    codes, scales = packed.tensors["codes"], packed.tensors["scales"]
    if packed.scheme.kind == "int8":
        row_major = torch.zeros((), dtype=torch.uint8, device=codes.device)
        return {"weight": codes, "SCB": scales, "weight_format": row_major}
    if packed.scheme.kind == "fp8":
        return {"weight": codes, "weight_scale": scales.unsqueeze(1)}
    if packed.scheme.kind == "fp8_block":
        return {"weight": codes, "weight_scale_inv": scales}
    state: dict[str, Any] = {
        "quant_type": packed.scheme.kind,
        "blocksize": packed.scheme.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    named = {
        "weight": codes.unsqueeze(1),
        "weight.absmax": scales,
        "weight.quant_map": codebook(packed.scheme.kind, codes.device).clone(),
    }
    if packed.scheme.double_quant:
        offset = packed.tensors["scale_offset"]
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = 0.0 if offset.is_meta else offset.item()
        named["weight.nested_absmax"] = packed.tensors["scale_scales"]
        named["weight.nested_quant_map"] = dynamic_map(codes.device).clone()
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=codes.device)
    return {**named, STATE + packed.scheme.kind: text}


def is_packed(names: Iterable[str]) -> bool:
    """Whether tensors of these names (as behind the path of one layer) are those of a packed weight.

    >>> is_packed(["weight", "bias"]), is_packed(["weight", "SCB", "weight_format"])
    (False, True)
    """
    return any(name in SUFFIXES and name != "weight" for name in names)


def stored_dtype(tensors: Mapping[str, Tensor], *, name: str = "weight") -> torch.dtype | None:
    """The dtype that a stored weight says it is decoded to; None where the format does not say."""
    key = next((key for key in tensors if key.startswith(STATE)), None)
    return None if key is None else DTYPES[_state(tensors[key], name)["dtype"]]


def from_tensors(tensors: Mapping[str, Tensor], *, name: str = "weight") -> PackedWeight:
    """The weight of the tensors `to_tensors` or bitsandbytes names so; `name` is what an error calls it.

    Scales whose own map or block is not the usual one are read through it and kept in float32: the same
    values in 0.37 bits more per parameter.

    Raises:
        ModelError: tensors are missing, or their shapes, dtypes or values contradict each other.
    """
    found = tensors.get("weight")
    if found is None:
        raise _damaged(name, "has no tensor 'weight'")
    if any(tensor.is_meta for tensor in tensors.values()):
        raise _damaged(name, "has no values: it lies on the meta device")
    key = next((key for key in tensors if key.startswith(STATE)), None)
    if key is not None:
        return _checked(_four_bit(tensors, key, name), name)
    if found.dim() != 2:
        raise _damaged(name, f"has codes of shape {list(found.shape)}, not of a matrix")
    kinds = [kind for kind, own in _EIGHT_BIT.items() if found.dtype == own[0] and own[1] in tensors]
    if not kinds:
        raise _damaged(name, f"of dtype {found.dtype} has no scales of a kind known here")
    scheme = Scheme(kinds[0])
    scales = _wide(tensors[_EIGHT_BIT[scheme.kind][1]])
    if scheme.has_row_scales:
        scales = scales.flatten()
    if scheme.kind == "fp8" and len(scales) == 1:
        scales = scales.repeat(len(found))
    return _checked(_of(scheme, found, codes=found, scales=scales), name)


_EIGHT_BIT = {
    "int8": (torch.int8, "SCB"),
    "fp8_block": (FLOAT8, "weight_scale_inv"),
    "fp8": (FLOAT8, "weight_scale"),
}
"""The dtype of the codes, and where their scales are."""


def _of(scheme: Scheme, shaped: Tensor | tuple[int, int], **tensors: Tensor) -> PackedWeight:
    rows, columns = shaped.shape if isinstance(shaped, Tensor) else shaped
    return PackedWeight(scheme, (rows, columns), MappingProxyType(tensors))


def _four_bit(tensors: Mapping[str, Tensor], key: str, name: str) -> PackedWeight:
    state = _state(tensors[key], name)
    kind, shape = state["quant_type"], tuple(state["shape"])
    if key != STATE + kind:
        raise _damaged(name, f"calls itself {key.rpartition('__')[2]!r} in one place and {kind!r} in another")
    codes = _bytes_of(tensors["weight"])
    absmax = _needed(tensors, "weight.absmax", name)
    table = _needed(tensors, "weight.quant_map", name)
    if not torch.equal(table.float(), codebook(kind, table.device)):
        raise _damaged(name, f"has a map of codes that is not that of {kind}")
    scheme = Scheme(kind, double_quant="nested_offset" in state, block_size=state["blocksize"])
    if not scheme.double_quant:
        return _of(scheme, shape, codes=codes, scales=_wide(absmax))
    inner = _wide(_needed(tensors, "weight.nested_absmax", name))
    table = _wide(_needed(tensors, "weight.nested_quant_map", name))
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
    if state["nested_blocksize"] == SCALE_BLOCK and torch.equal(table, dynamic_map(table.device)):
        return _of(scheme, shape, codes=codes, scales=absmax, scale_scales=inner, scale_offset=offset)
    return _of(
        Scheme(kind, double_quant=False, block_size=scheme.block_size),
        shape,
        codes=codes,
        scales=_read_scales(absmax, inner, table, state["nested_blocksize"], name) + offset,
    )


def _read_scales(codes: Tensor, scales: Tensor, table: Tensor, block: int, name: str) -> Tensor:
    blocks = -(-codes.numel() // block)
    if codes.dtype != torch.uint8 or table.shape != (256,) or scales.shape != (blocks,):
        raise _damaged(name, "has scales that do not fit their own map or block size")
    return by_blocks(table[codes.flatten().int()], scales, block)


def _wide(scales: Tensor) -> Tensor:
    """In float32, whatever float they came in; codes of scales are no scales."""
    return scales.float() if scales.is_floating_point() else scales


def _bytes_of(tensor: Tensor) -> Tensor:
    """The codes as bytes: bitsandbytes may keep them in a tensor of a wider dtype."""
    return tensor.contiguous().view(torch.uint8).flatten()


def _state(text: Tensor, name: str) -> dict[str, Any]:
    """What the JSON text beside a 4-bit weight says, checked."""
    if text.dtype != torch.uint8 or text.dim() != 1 or len(text) > _LONGEST_STATE:
        raise _damaged(name, "has a description that is not a short text")
    try:
        state = json.loads(bytes(text.tolist()))
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"has a description that is not JSON ({error})") from error
    wrong = [key for key, is_right in _RULES.items() if not _fits(state, key, is_right)]
    if wrong:
        raise _damaged(name, f"has a description with a missing or impossible {', '.join(wrong)}")
    assert isinstance(state, dict)
    return state


def _fits(state: object, key: str, is_right: Any) -> bool:
    if not isinstance(state, dict):
        return False
    if key.startswith("nested") and "nested_offset" not in state and "nested_blocksize" not in state:
        return True
    return bool(is_right(state.get(key)))


def _is_block(value: object) -> bool:
    return type(value) is int and value in BLOCKS


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**48


_RULES = {
    "quant_type": lambda value: value in ("nf4", "fp4"),
    "blocksize": _is_block,
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "shape": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)),
    "nested_blocksize": _is_block,
    "nested_offset": lambda value: type(value) in (int, float) and abs(value) < 3e38,
}


def _needed(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise _damaged(name, f"has no tensor {key!r}")
    return tensors[key]


def _checked(packed: PackedWeight, name: str) -> PackedWeight:
    for part, (shape, dtype) in layout(packed.scheme, packed.shape).items():
        tensor = packed.tensors[part]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            seen = f"{list(tensor.shape)} of {tensor.dtype}, where {list(shape)} of {dtype} belong"
            raise _damaged(name, f"is a {list(packed.shape)} with {part} {seen}")
        if dtype == torch.float32 and not torch.isfinite(tensor).all():
            raise _damaged(name, f"has {part} that are NaN or infinite")
    return packed


def _damaged(name: str, what: str) -> ModelError:
    return ModelError(
        f"The quantised weight {name} {what}.",
        meaning="The file is damaged, or was written in a format that is not read here.",
        fix="Copy or download the model again, or quantise its 16-bit original.",
    )
