"""One way to read and replace the weights of a base layer, whatever its kind.

A merge asks for dense weights in the orientation of `nn.Linear` ([out, in]) and puts replacements in as *new*
parameters. The original `Parameter` objects are handed back untouched by `restore`, so an unmerge is exact to
the byte, and a tensor that was tied to another module stays with that module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import MergeError


@dataclass(frozen=True)
class WeightHandle:
    """The dense weights of one base layer.

    >>> handle = WeightHandle(nn.Linear(2, 3))
    >>> {name: tuple(value.shape) for name, value in handle.read().items()}
    {'weight': (3, 2), 'bias': (3,)}
    """

    module: nn.Module

    @property
    def is_transposed(self) -> bool:
        """GPT-2's `Conv1D` stores [in, out]. What stands in for a layer says so by `stands_for`."""
        return isinstance(getattr(self.module, "stands_for", self.module), Conv1D)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        rows, columns = self.module.get_parameter("weight").shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    def weight(self) -> Tensor:
        """The weight alone as [out, in], detached, in the dtype it is stored in; no copy."""
        return self._oriented("weight", self.module.get_parameter("weight").detach())

    def read(self) -> dict[str, Tensor]:
        """Every parameter by name in float32 (float64 stays), `weight` as [out, in]."""
        return {name: self._oriented(name, widened(p.detach())) for name, p in self.module.named_parameters()}

    @torch.no_grad()
    def replace(self, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """Put new parameters (copies of `tensors`) in place of those named; returns the originals."""
        originals = {name: self.module.get_parameter(name) for name in tensors}
        for name, tensor in tensors.items():
            original = originals[name]
            dense = torch.empty_like(original, memory_format=torch.contiguous_format)
            dense.copy_(self._oriented(name, tensor))
            self._put(name, nn.Parameter(dense, requires_grad=original.requires_grad))
        return originals

    def restore(self, originals: Mapping[str, nn.Parameter]) -> None:
        """Put these very parameter objects in place: the inverse of `replace`."""
        for name, parameter in originals.items():
            self._put(name, parameter)

    def require_dense(self) -> None:
        """Refuse storage types whose rounding would eat the update."""
        for name, parameter in self.module.named_parameters():
            if parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                raise MergeError(
                    f"Parameter {name!r} has dtype {str(parameter.dtype).removeprefix('torch.')}.",
                    meaning="Merging into a packed or 8-bit weight rounds most of the update away.",
                    fix="Load the base with dtype='bfloat16' and merge there.",
                )

    def _oriented(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if self.is_transposed and name == "weight" else tensor

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(owner), leaf, parameter)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
