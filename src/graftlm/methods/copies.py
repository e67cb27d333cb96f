"""`modules_to_save`: full trained copies of modules, such as a new head, kept beside the base's own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from graftlm.core.errors import TargetError
from graftlm.methods.base import Dense, Part, SiteAdapter
from graftlm.methods.site import parents
from graftlm.quant.facts import dtype_of, is_in_few_bits
from graftlm.quant.weights import WeightHandle


class FullCopy(SiteAdapter):
    """A trained copy that answers in place of the base module. The base module is not called."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.copied_from = {name: id(parameter) for name, parameter in base.named_parameters()}
        self.module = copy.deepcopy(base).float()
        for parameter in self.module.parameters():
            parameter.requires_grad_(True)

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = dtype_of(base)
        tensors = {name: tensor.to(dtype) for name, tensor in self.module.named_parameters()}
        return functional_call(self.module, tensors, (x, *args), kwargs)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {name: value.to(dense[name].dtype) for name, value in WeightHandle(self.module).read().items()}


def owners(modules: Mapping[str, nn.Module]) -> list[str]:
    """The outermost modules that hold parameters themselves; a copy of one includes what is inside."""
    owners: dict[str, nn.Module] = {}
    for path, module in modules.items():
        holds = any(parameter is not None for parameter in module._parameters.values())
        if path and holds and owners.keys().isdisjoint(parents(path)):
            owners[path] = module
    return list(owners)


def refuse_packed(modules: Mapping[str, nn.Module]) -> None:
    """What is stored in few bits cannot be trained itself.

    Raises:
        TargetError: names such modules.
    """
    packed = [path for path, module in modules.items() if is_in_few_bits(module)]
    if packed:
        more = [f"... and {len(packed) - 5} more"] if len(packed) > 5 else []
        raise TargetError(
            f"{len(packed)} of the modules to be trained whole are quantised.",
            problems=[*packed[:5], *more],
            meaning="A step of training is far smaller than the distance between two codes of 4 or 8 bits.",
            fix="Train an adapter on them (LoRA, for instance), or load the base with quantization='none'.",
        )


def keep_ties(parts: Iterable[Part]) -> None:
    """Copies of one and the same parameter, as of tied embeddings, become one parameter again."""
    copies: dict[int, nn.Parameter] = {}
    for part in parts:
        if isinstance(part, FullCopy):
            for name, origin in part.copied_from.items():
                owner, _, leaf = name.rpartition(".")
                shared = copies.setdefault(origin, part.module.get_parameter(name))
                setattr(part.module.get_submodule(owner), leaf, shared)
