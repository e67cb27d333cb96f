"""What the tensors of a run weigh, counted from the tensors that are there."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.methods.full import is_norm
from graftlm.quant.embedding import QuantisedEmbedding
from graftlm.quant.module import PackedModule

QUANTISED, DENSE, EXPERTS = "quantised linears", "dense linears", "dense experts"
EMBEDDINGS, HEAD, NORMS, OTHER = "embeddings", "output head", "norms", "other"
BASE = (QUANTISED, DENSE, EXPERTS, EMBEDDINGS, HEAD, NORMS, OTHER)
TRAINED, GRADIENTS, OPTIMIZER = "trained", "gradients", "optimizer state"


@dataclass(frozen=True)
class TensorClass:
    """Tensors of one kind. `parameters` are the values that they stand for, packed or not."""

    name: str
    parameters: int
    bytes: int

    @property
    def bits(self) -> float:
        """Per parameter."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "parameters": self.parameters, "bytes": self.bytes, "bits": self.bits}


class _Count:
    """Sums by class; a tensor that stands at two places (tied) counts at the first."""

    def __init__(self) -> None:
        self.parameters: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self._seen: set[tuple[torch.device, int]] = set()

    def add(self, kind: str, tensor: Tensor, *, parameters: int | None = None) -> None:
        """One tensor; `parameters` where it stands for another number of them than it has elements."""
        storage = tensor.untyped_storage()
        place = (tensor.device, storage.data_ptr() or storage._cdata)  # without values it lies nowhere
        if tensor.numel() == 0 or place in self._seen:
            return
        self._seen.add(place)
        count = tensor.numel() if parameters is None else parameters
        self.parameters[kind] = self.parameters.get(kind, 0) + count
        self.bytes[kind] = self.bytes.get(kind, 0) + tensor.numel() * tensor.element_size()

    def of(self, kind: str, *, parameters: int | None = None) -> TensorClass:
        count = self.parameters.get(kind, 0) if parameters is None else parameters
        return TensorClass(kind, count, self.bytes.get(kind, 0))


def tensor_classes(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    without_gradient: Collection[str] = (),
) -> tuple[TensorClass, ...]:
    """Weights of the base by kind, the trained parameters, their gradients and the optimizer's state.

    A gradient has the size of its parameter and lives from the backward pass to the update. Gradients and
    state are told per trained parameter.

    Args:
        without_gradient: names of parameters that get none.
    """
    count = _Count()
    for parameter in parameters.values():
        count.add(TRAINED, parameter)
    _count_base(model, count)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                count.add(OPTIMIZER, value)
    trained = count.parameters.get(TRAINED, 0)
    own = [item for name, item in parameters.items() if name not in without_gradient]
    gradients = TensorClass(GRADIENTS, trained, sum(item.numel() * item.element_size() for item in own))
    base = [count.of(kind) for kind in BASE]
    state_of_all = count.of(OPTIMIZER, parameters=trained)
    return tuple(found for found in (*base, count.of(TRAINED), gradients, state_of_all) if found.bytes)


def base_classes(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> tuple[TensorClass, ...]:
    """Weights of the base by kind, and the trained parameters; also of a model without values."""
    count = _Count()
    for parameter in trained.values():
        count.add(TRAINED, parameter)
    _count_base(model, count)
    return tuple(found for kind in (*BASE, TRAINED) if (found := count.of(kind)).bytes)


def _count_base(model: nn.Module, count: _Count) -> None:
    head = output_head(model)
    for module in model.modules():
        if isinstance(module, PackedModule):
            inner = EMBEDDINGS if isinstance(module, QuantisedEmbedding) else QUANTISED
            kind, packed = HEAD if module is head else inner, module.packed
            for place, tensor in enumerate(packed.stored):
                count.add(kind, tensor, parameters=math.prod(packed.shape) if place == 0 else 0)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            count.add(HEAD if module is head else class_of_tensor(module, tensor), tensor)


def class_of_tensor(module: nn.Module, tensor: Tensor) -> str:
    """The kind of a dense tensor of a base that is not of its output head."""
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if isinstance(module, nn.Linear | Conv1D):
        return DENSE
    if tensor.dim() == 3:  # one matrix for each expert
        return EXPERTS
    return NORMS if is_norm(module) else OTHER


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that gives the logits of a model that writes text, without an adapter around it."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(found, "base_layer", found)
    return head if isinstance(head, nn.Module) else None
