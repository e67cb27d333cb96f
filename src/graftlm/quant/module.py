"""A module whose weight is stored in few bits: moving, copying, saving and loading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import ModelError
from graftlm.kernels.decoding import PARTS
from graftlm.quant.packed import PackedWeight
from graftlm.quant.storage import SUFFIXES, from_tensors, is_packed, stored_dtype, to_tensors


class PackedModule(nn.Module):
    """Holds the tensors of a `PackedWeight` as plain buffers, and the dtype that they are decoded to.

    A merge may put a dense weight in the packed one's place (`dense`); the packed one stays as it is.
    A state dict holds the packed weight under the names of bitsandbytes, or the dense one that stands in.
    """

    dense: nn.Parameter | None
    made_from: type[nn.Module] = nn.Linear
    """The kind of layer that it stands in for; GPT-2's `Conv1D` has its dense weight as [in, out]."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.dtype, self.shape = packed.scheme, dtype, packed.shape
        for name in PARTS:
            self.register_buffer(name, packed.tensors.get(name), persistent=False)
        self.register_parameter("dense", None)

    @property
    def packed(self) -> PackedWeight:
        """The stored weight."""
        held = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        return PackedWeight(self.scheme, self.shape, MappingProxyType(held))

    def fill(self, packed: PackedWeight, *, name: str = "weight") -> None:
        """Take this weight, whatever its scheme; no copy.

        Raises:
            ModelError: it has another shape; `name` is what the error calls it.
        """
        shape = self.shape
        if packed.shape != shape:
            raise ModelError(
                f"The quantised weight {name} is a {list(packed.shape)}; the layer takes {list(shape)}.",
                meaning="The file belongs to a model of other sizes.",
                fix="Load the folder that its config.json describes.",
            )
        self.scheme = packed.scheme
        for part in PARTS:
            setattr(self, part, packed.tensors.get(part))

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in] in the dtype that the layer stands for. Decoded at every call."""
        return self.packed.decode(self.dtype) if self.dense is None else self.dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to(device)` moves the packed weight; `.to(dtype)` changes what it is decoded to."""
        held = {name: self._buffers.pop(name) for name in PARTS}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            codes = held["codes"]
            assert codes is not None
            probe = fn(torch.empty(0, dtype=self.dtype, device=codes.device))
            held = {name: part if part is None else _moved(part, probe.device) for name, part in held.items()}
            self.dtype = probe.dtype
        finally:
            self._buffers.update(held)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        dense = own.pop(f"{prefix}dense", None)
        stored = to_tensors(self.packed, self.dtype) if dense is None else {"weight": self._turned(dense)}
        destination.update({prefix + name: tensor for name, tensor in stored.items()})
        destination.update(own)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: state_dict[prefix + name] for name in SUFFIXES if prefix + name in state_dict}
        others = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in given}
        if is_packed(given):
            try:
                self._take(given, prefix, keeps=bool(local_metadata.get("assign_to_params_buffers")))
            except ModelError as error:
                error_msgs.append(str(error))
        elif "weight" in given and self.dense is not None:
            others[f"{prefix}dense"] = self._turned(given["weight"])
        elif "weight" in given:
            error_msgs.append(f"{prefix}weight is dense; this layer takes a quantised weight.")
        else:
            missing_keys.append(f"{prefix}weight")
        rest = (strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(others, prefix, local_metadata, *rest)

    def _take(self, given: Mapping[str, Tensor], prefix: str, *, keeps: bool) -> None:
        """The packed weight of a state dict: its very tensors where it `keeps` them, copies otherwise."""
        packed = from_tensors(given, name=f"{prefix}weight")
        held_on = self.packed.tensors["codes"].device
        device = packed.tensors["codes"].device if held_on.type == "meta" else held_on
        held = {
            name: tensor if keeps else tensor.detach().to(device, copy=True)
            for name, tensor in packed.tensors.items()
        }
        self.fill(PackedWeight(packed.scheme, packed.shape, MappingProxyType(held)), name=f"{prefix}weight")
        self.dtype = stored_dtype(given) or self.dtype
        self.dense = None

    def _turned(self, dense: Tensor) -> Tensor:
        """Between [out, in] and the orientation in which its architecture stores a dense weight."""
        return dense.t().contiguous() if self.made_from is Conv1D else dense


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`to_empty` gives memory to what has none yet; everything else moves as it is."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
