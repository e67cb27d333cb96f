"""A place that leaves the module where it is: a child of it, which acts through its forward hooks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from graftlm.methods.place import Place

NAME = "graft_gate"


class HookedPlace(Place):
    """Stands at `path` of a model; so its parts are among the model's parameters, and are moved with them."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self._module = (model.get_submodule(path),)  # in a tuple: the module is the parent, not a child
        self._handles: list[RemovableHandle] = []
        self.train(self.module.training)

    @property
    def module(self) -> Any:
        """Where it stands."""
        return self._module[0]

    def install(self, model: nn.Module) -> None:
        """Join the module, which lies in `model`."""
        self.module.add_module(NAME, self)
        self._handles = self.hook(model)

    @abstractmethod
    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Register what acts here."""

    def uninstall(self) -> None:
        """The inverse of `install`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        del self.module._modules[NAME]
