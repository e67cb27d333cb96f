"""Where adapters add to what an attention returns, from its input and its other arguments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftlm.methods.base import ModelAdapter
from graftlm.methods.virtual.hooked import HookedPlace


class AttentionAdapter(ModelAdapter):
    """A part that adds something to the output of an attention."""

    @abstractmethod
    def change(self, attention: Any, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """What is added, [B, T, hidden size]; `x` [B, T, hidden size] is the attention's input."""


class AttentionGate(HookedPlace):
    """Stands at one attention and adds the changes of what is active there."""

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        return [self.module.register_forward_hook(self._after, with_kwargs=True)]

    def adapter(self, name: str) -> AttentionAdapter:
        """The part of the adapter of that name."""
        found = super().adapter(name)
        assert isinstance(found, AttentionAdapter)
        return found

    def _after(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        is_routed = self.route is not None and self.is_enabled
        if not (is_routed or self.shown):
            return None
        x = args[0] if args else kwargs["hidden_states"]
        total, *others = output
        if not is_routed:
            for name in self.shown:
                total = total + self.adapter(name).change(attention, x, kwargs).to(total.dtype)
            return (total, *others)
        assert self.route is not None
        for routed, rows in self.route.rows.items():
            if routed is not None and self.has(routed):
                index = rows.to(x.device)
                own = {key: _rows_of(value, index, len(x)) for key, value in kwargs.items()}
                change = self.adapter(routed).change(attention, x[index], own)
                total = torch.index_add(total, 0, index, change.to(total.dtype))
        return (total, *others)


def _rows_of(value: Any, index: Tensor, rows: int) -> Any:
    """Tensors that go with the rows of the input; what all rows share stays whole."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
        return value[index]
    return tuple(_rows_of(one, index, rows) for one in value) if type(value) is tuple else value
