"""`modules_to_save`: full trained copies of modules, such as a new head, kept beside the base's own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from graftlm.methods.base import Dense, SiteAdapter
from graftlm.quant.weights import WeightHandle


class FullCopy(SiteAdapter):
    """A trained copy that answers in place of the base module. The base module is not called."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(base).float()
        for parameter in self.module.parameters():
            parameter.requires_grad_(True)

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = next(base.parameters()).dtype
        tensors = {name: tensor.to(dtype) for name, tensor in self.module.named_parameters()}
        return functional_call(self.module, tensors, (x, *args), kwargs)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {name: value.to(dense[name].dtype) for name, value in WeightHandle(self.module).read().items()}
