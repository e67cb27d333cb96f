"""One way to read and replace the weights of a base layer, whatever its kind: dense, ours, bitsandbytes'.

A merge asks for dense weights in the orientation of `nn.Linear` ([out, in]) and puts replacements in as *new*
parameters. The original `Parameter` objects are handed back untouched by `restore`, so an unmerge is exact to
the byte, and a tensor that was tied to another module stays with that module.

A packed weight is never written to: the dense one stands beside it as the layer's parameter `dense`, and
counts in its place. What a layer holds for `weight` is then that parameter, or None for "as packed".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import MergeError
from graftlm.kernels.quantised import quantised_linear
from graftlm.quant.foreign import is_foreign, made_from, packed_of, stands_for
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.module import PackedModule
from graftlm.quant.packed import PackedWeight

DENSE_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Held = nn.Parameter | None
"""What a layer holds under one name; None is the packed weight, which never leaves its layer."""


@dataclass(frozen=True)
class WeightHandle:
    """The weights of one base layer.

    >>> handle = WeightHandle(nn.Linear(2, 3))
    >>> {name: tuple(value.shape) for name, value in handle.read().items()}
    {'weight': (3, 2), 'bias': (3,)}
    """

    module: nn.Module
    """The layer, or what stands in for one and says so by `stands_for`; `its_own` is then seen in place of
    what the layer holds."""

    @property
    def is_packed(self) -> bool:
        """Whether the weight is stored in few bits, by us or by bitsandbytes, merged or not."""
        return isinstance(self._layer, PackedModule) or is_foreign(self._layer)

    @property
    def is_transposed(self) -> bool:
        """GPT-2's `Conv1D` stores [in, out]. Packed weights are [out, in], whatever they were made from."""
        return isinstance(self._layer, Conv1D)

    @property
    def made_from(self) -> type[nn.Module]:
        """The kind of dense layer that the architecture has here; `Conv1D` has its weight as [in, out]."""
        layer = self._layer
        if not self.is_packed:
            return type(layer)
        return layer.made_from if isinstance(layer, PackedModule) else made_from(layer)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        if isinstance(self._layer, PackedModule):
            return self._layer.shape
        if self.is_packed:
            return self._layer.out_features, self._layer.in_features
        rows, columns = self.module.get_parameter("weight").shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight: the stored one, or what a packed one stands for."""
        return self.dtype_of("weight")

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which the layer computes with what it holds under this name."""
        held = self._held(name)
        return self._packed_dtype if held is None else held.dtype

    @property
    def device(self) -> torch.device:
        """Where the layer computes; its weight may be elsewhere for the time being, and says so then."""
        computes_on: torch.device | None = getattr(self._layer, "computes_on", None)
        if computes_on is not None:
            return computes_on
        if self.is_packed:
            return self.stored.device
        return next(self.module.parameters()).device

    @property
    def packed(self) -> PackedWeight:
        """The packed weight of a layer that has one, merged or not."""
        return self._layer.packed if isinstance(self._layer, PackedModule) else packed_of(self._layer)

    @property
    def stored(self) -> Tensor:
        """The tensor that the weight is read from; while it is the same, unchanged, so is the weight."""
        held = self._held("weight")
        if held is not None:
            return held
        found = self._layer.codes if isinstance(self._layer, PackedModule) else self._layer.weight
        assert isinstance(found, Tensor)
        return found

    def weight(self) -> Tensor:
        """The weight alone as [out, in], detached, in `dtype`. A dense one is no copy; a packed one is
        decoded at every call."""
        held = self._held("weight")
        return self.packed.decode(self.dtype) if held is None else self._oriented("weight", held.detach())

    def read(self) -> dict[str, Tensor]:
        """Every parameter by name in float32 (float64 stays), `weight` as [out, in]."""
        return {
            name: self.packed.decode() if held is None else self._oriented(name, widened(held.detach()))
            for name, held in self.held().items()
        }

    def held(self, *, recurse: bool = True) -> dict[str, Held]:
        """What the layer (and with `recurse` what is inside it) holds now, by name: what `restore` takes."""
        found: dict[str, Held] = dict(self.module.named_parameters(recurse=recurse))
        if self.is_packed:
            found = {"weight": found.pop("dense", None)} | {n: p for n, p in found.items() if n != "weight"}
        return found | getattr(self.module, "its_own", {})

    def tensors(self) -> dict[str, Tensor]:
        """What the layer computes with now, by name, in its own layout: a packed weight decoded."""
        return {name: self.weight() if held is None else held for name, held in self.held().items()}

    @torch.no_grad()
    def replace(self, tensors: Mapping[str, Tensor]) -> dict[str, Held]:
        """Put new parameters (copies of `tensors`, rounded once) in place of those named; returns the
        originals. In place of a packed weight comes a dense one in `dtype`."""
        originals = {name: self._held(name) for name in tensors}
        for name, tensor in tensors.items():
            original, oriented = originals[name], self._oriented(name, tensor)
            kind = (self.dtype, self.device) if original is None else (original.dtype, original.device)
            dense = torch.empty(oriented.shape, dtype=kind[0], device=kind[1]).copy_(oriented)
            is_trained = original is not None and original.requires_grad
            self._put(name, nn.Parameter(dense, requires_grad=is_trained))
        return originals

    def restore(self, originals: Mapping[str, Held]) -> None:
        """Put these very parameter objects in place, or the packed weight again: the inverse of `replace`."""
        for name, parameter in originals.items():
            self._put(name, parameter)

    def call(self, held: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
        """What the layer gives with these in place of what it holds; a None under `weight` is as packed.

        Tensors are in the layout of the layer's own parameters.
        """
        if not self.is_packed:
            given = {name: tensor for name, tensor in held.items() if tensor is not None}
            return functional_call(self.module, given, args, kwargs)
        weight, bias = ({**self.held(), **held}.get(name) for name in ("weight", "bias"))
        (x,) = args or kwargs.values()
        if weight is not None:
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if isinstance(self._layer, QuantisedLinear):
            packed, kind = self.packed, self._layer.kind
            return quantised_linear(x, packed.stored, kind, packed.scheme.block_size, *packed.shape, bias)
        return functional_call(self.module, {} if bias is None else {"bias": bias}, (x,))

    def require_dense(self) -> None:
        """Refuse storage types whose rounding would eat the update. A packed weight has a place for a dense
        one beside it; 8-bit weights of other kinds have none.

        Raises:
            MergeError: an 8-bit parameter.
        """
        for name, held in self.held().items():
            if held is not None and held.dtype not in DENSE_TYPES:
                raise MergeError(
                    f"Parameter {name!r} has dtype {str(held.dtype).removeprefix('torch.')}.",
                    meaning="Merging into a packed or 8-bit weight rounds most of the update away.",
                    fix="Load the base with dtype='bfloat16' and merge there.",
                )

    @property
    def _layer(self) -> Any:
        return getattr(self.module, "stands_for", self.module)

    @property
    def _packed_dtype(self) -> torch.dtype:
        return self._layer.dtype if isinstance(self._layer, PackedModule) else stands_for(self._layer)

    def _held(self, name: str) -> Held:
        its_own: Mapping[str, Held] = getattr(self.module, "its_own", {})
        if name in its_own:
            return its_own[name]
        if name == "weight" and self.is_packed:
            dense: Held = getattr(self._layer, "dense", None)
            return dense
        return self.module.get_parameter(name)

    def _oriented(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if self.is_transposed and name == "weight" else tensor

    def _put(self, name: str, parameter: Held) -> None:
        if name == "weight" and self.is_packed:
            self.module.register_parameter("dense", parameter)
            return
        owner, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(owner), leaf, parameter)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
