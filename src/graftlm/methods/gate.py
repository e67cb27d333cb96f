"""Where adapters act on what a whole stack of layers reads."""

from __future__ import annotations

from torch import nn

from graftlm.methods.place import Place

NAME = "graft_gate"


class Gate(Place):
    """Stands at a stack of layers as a child module of it."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self._stack = (model.get_submodule(path),)  # in a tuple: the stack is the parent, not a child
        self.train(self._stack[0].training)

    def install(self) -> None:
        """Join the stack."""
        self._stack[0].add_module(NAME, self)

    def uninstall(self) -> None:
        """The inverse of `install`."""
        del self._stack[0]._modules[NAME]
