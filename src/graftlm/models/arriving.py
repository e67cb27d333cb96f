"""Weights on their way from a file into a model, in the form in which `transformers` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from graftlm.core.errors import ModelError
from graftlm.models.tensor_files import StoredTensor
from graftlm.quant.packed import PackedWeight
from graftlm.quant.storage import SUFFIXES, from_tensors

Tick = Callable[[int], None]
"""Called with the number of bytes read."""


@dataclass(frozen=True)
class Values:
    """A tensor that is read when it is asked for by `[...]`."""

    stored: StoredTensor
    tick: Tick

    def __getitem__(self, index: EllipsisType) -> Tensor:
        values = self.stored.read()
        self.tick(self.stored.nbytes)
        return values


@dataclass(frozen=True)
class PackedValues:
    """The tensors of one packed weight, by suffix, read together when the weight is asked for."""

    name: str
    stored: Mapping[str, StoredTensor]
    tick: Tick
    faults: list[str]

    def __getitem__(self, index: EllipsisType) -> ArrivingWeight:
        tensors = {suffix: Values(stored, self.tick)[...] for suffix, stored in self.stored.items()}
        try:
            return ArrivingWeight.of(from_tensors(tensors, name=self.name))
        except ModelError as error:
            self.faults.append(error.seen)
            return ArrivingWeight.of(None)


class ArrivingWeight(Tensor):
    """A packed weight that passes for a tensor: moving it does nothing, computing with it decodes it.

    So a weight that belongs to a linear layer arrives packed, and one that a conversion stacks with others
    (the experts of a mixture) becomes a dense part of the result.
    """

    packed: PackedWeight | None
    wanted: torch.dtype

    @classmethod
    def of(cls, packed: PackedWeight | None) -> ArrivingWeight:
        """None stands for a weight that could not be read; it counts as empty."""
        shape = (0, 0) if packed is None else packed.shape
        made = torch.empty(shape, device="meta").as_subclass(cls)
        made.packed, made.wanted = packed, torch.float32
        return made

    def dense(self) -> Tensor:
        """The decoded weight [out, in] in the dtype that was last asked for."""
        return torch.empty(0, 0) if self.packed is None else self.packed.decode(self.wanted)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.to:
            weight: ArrivingWeight = args[0]
            weight.wanted = (kwargs or {}).get("dtype") or weight.wanted
            return weight
        if func.__name__ == "__get__":  # .shape, .dtype and their like
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        plain, options = tree_map(_decoded, (list(args), dict(kwargs or {})))
        return func(*plain, **options)


def _decoded(item: object) -> object:
    return item.dense() if isinstance(item, ArrivingWeight) else item


def on_their_way(
    tensors: Mapping[str, StoredTensor], tick: Tick, faults: list[str], *, packed: bool
) -> dict[str, Values | PackedValues]:
    """Every tensor of a checkpoint by its name; where it is `packed`, the tensors of one weight as one.

    Codes without scales are added to `faults`.
    """
    groups = _groups(tensors) if packed else {}
    taken = {f"{path}.{suffix}" for path, group in groups.items() for suffix in group}
    found: dict[str, Values | PackedValues] = {}
    for name, stored in tensors.items():
        if name not in taken:
            found[name] = Values(stored, tick)
            if packed and name.endswith(".weight") and stored.dtype.itemsize == 1:
                faults.append(f"{name}: stored in {str(stored.dtype).removeprefix('torch.')} without scales")
    for path, group in groups.items():
        name = f"{path}.weight"
        if "weight" in group:
            found[name] = PackedValues(name, group, tick, faults)
        else:
            faults.append(f"{name}: missing, but {path}.{min(group)} is there")
    return found


def _groups(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Layer -> suffix -> tensor, of the layers that have more than a plain weight."""
    groups: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in tensors.items():
        for suffix in SUFFIXES:
            if suffix != "weight" and name.endswith(f".{suffix}"):
                groups.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = stored
    for path, group in groups.items():
        if f"{path}.weight" in tensors:
            group["weight"] = tensors[f"{path}.weight"]
    return groups
