"""How much memory a model's weights take, by what they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graftlm.quant.module import PackedModule


@dataclass(frozen=True)
class Footprint:
    """Bytes of the packed linear layers, and of everything else."""

    kind: str
    packed_bytes: int
    packed_parameters: int
    other_bytes: dict[str, int]
    """`embeddings`, `head`, `experts`, `other matrices` and `norms and biases`: those that the model has."""
    dtype: str

    @property
    def bits_per_parameter(self) -> float:
        """Of the packed layers, measured on their tensors."""
        return 8 * self.packed_bytes / max(self.packed_parameters, 1)

    def __str__(self) -> str:
        names = ", ".join(f"{name} {_text(size)}" for name, size in sorted(self.other_bytes.items()))
        packed = f"{_text(self.packed_bytes)} as {self.kind}"
        others = f"{_text(sum(self.other_bytes.values()))} stays {self.dtype}: {names}"
        return f"{packed} ({self.bits_per_parameter:.2f} bits per quantised parameter); {others}"


def footprint(model: Any) -> Footprint:
    """Measure a model with packed layers. Embeddings and a head in 8 bits count under names that say so."""
    output, table = model.get_output_embeddings(), model.get_input_embeddings()
    kind, size, count = "none", 0, 0
    others: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        place = "head" if module is output else "embeddings" if module is table else None
        if isinstance(module, PackedModule):
            own = sum(map(_size, module.packed.tensors.values()))
            if place is None:
                kind, size, count = module.scheme.kind, size + own, count + math.prod(module.packed.shape)
            else:
                name = f"{place} as {module.scheme.kind}"
                others[name] = others.get(name, 0) + own
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = place or _class_of(module, parameter)
                others[name] = others.get(name, 0) + _size(parameter)
    return Footprint(kind, size, count, others, str(model.dtype).removeprefix("torch."))


def _class_of(module: nn.Module, parameter: Tensor) -> str:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if parameter.dim() < 2:
        return "norms and biases"
    return "experts" if parameter.dim() == 3 else "other matrices"  # experts: one matrix for each


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _text(size: int) -> str:
    """
    >>> _text(1_230_000_000), _text(45_600_000)
    ('1.23 GB', '45.6 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
