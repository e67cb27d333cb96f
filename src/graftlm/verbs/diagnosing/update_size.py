"""How far an adapter has moved while it is trained, and how large its change of each weight is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import Part
from graftlm.methods.dora import DoraLinear
from graftlm.methods.low_rank import LoraLinear
from graftlm.models.streaming.streamed import RESIDENT, placement_of
from graftlm.quant.weights import WeightHandle

SAMPLED = 23
"""Weights whose norm is taken, evenly spread over the model: packed ones have to be decoded for it. Prime, so
that the places do not always meet the same projection."""
SHOWN = 5


class UpdateSize:
    """Measures one or several adapters. Reads only: random state and tensors stay as they are."""

    def __init__(
        self, adapters: Mapping[str, tuple[nn.Module, AdapterSet, str]], trained: Mapping[str, nn.Parameter]
    ) -> None:
        """`adapters`: (model, adapters, name of the one that is trained) by a prefix for paths."""
        self._trained = trained
        norms = self._norms()
        zero = {name: 0.0 for name, norm in norms.items() if norm == 0.0}
        self._start = zero or norms
        found = {
            prefix + path: (model, path, lora)
            for prefix, (model, owner, name) in adapters.items()
            if placement_of(model)[0] == RESIDENT
            for path, part in owner.parts(name).items()
            if (lora := _factored(part)) is not None
        }
        count = min(SAMPLED, len(found))
        chosen = [list(found.items())[place * len(found) // count] for place in range(count)]
        self.sampled = {shown: (lora, _norm_at(model, path)) for shown, (model, path, lora) in chosen}
        """The adapter and the norm of the weight, by path."""

    def measure(self) -> dict[str, Any]:
        """moved: share of the tensors that are not as they began, of those that began at zero where some did,
        as any update shows there; still: names of some that are; median, largest, largest_at: the norm of the
        change of a weight over that of the weight.
        """
        now = self._norms()
        still = [name for name, began in self._start.items() if now[name] == began]
        found: dict[str, Any] = {"moved": 1 - len(still) / max(1, len(self._start)), "still": still[:SHOWN]}
        if not self.sampled:
            return found
        changes = torch.stack([_change(lora) for lora, _ in self.sampled.values()])
        norms = torch.stack([norm for _, norm in self.sampled.values()]).to(changes)
        sizes = dict(zip(self.sampled, (changes / norms).tolist(), strict=True))
        largest = max(sizes, key=lambda path: sizes[path])
        middle = sorted(sizes.values())[len(sizes) // 2]
        return {**found, "median": middle, "largest": sizes[largest], "largest_at": largest}

    @torch.no_grad()
    def _norms(self) -> dict[str, float]:
        values = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in self._trained.values()]
        return dict(zip(self._trained, torch.stack(values).tolist(), strict=True))


def _factored(part: Part) -> LoraLinear | None:
    inner = part.lora if isinstance(part, DoraLinear) else part
    return inner if isinstance(inner, LoraLinear) else None


@torch.no_grad()
def _norm_at(model: nn.Module, path: str) -> Tensor:
    site = model.get_submodule(path)
    weight = WeightHandle(getattr(site, "base_layer", site)).weight()
    norm: Tensor = torch.linalg.vector_norm(weight, dtype=torch.float32).clamp_min(1e-12)
    return norm


@torch.no_grad()
def _change(lora: LoraLinear) -> Tensor:
    """Frobenius norm of the change, from products of the size of the rank."""
    a, b = (factor.float() for factor in lora.factors())
    square = ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0.0)
    norm: Tensor = square.sqrt() * abs(lora.scaling)
    return norm
