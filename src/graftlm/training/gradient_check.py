"""Whether every trained parameter learns, looked at once, in the first step of a process.

A parameter without a gradient never changes. Where its layer did not even run (an expert that no token chose,
a part of the model for images), that may be meant; where it ran, something cuts the graph behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graftlm.core.errors import TrainingError

_SHOWN = 5
SEVERAL = "@"
"""Begins the names of models that are trained by turns (`graftlm.models.siblings`)."""


@dataclass
class FirstStep:
    """The layers that trained parameters stand at, and those of them that have run."""

    layers: dict[str, str]
    ran: set[str] = field(default_factory=set)

    @property
    def seen(self) -> set[str]:
        """The parameters of models that ran: of several that are trained by turns, a step runs one."""
        ran = {_model_of(path) for path in self.ran}
        return {name for name, path in self.layers.items() if _model_of(path) in ran}

    def judge(self, without: Collection[str]) -> str | None:
        """What to say about the parameters `without` a gradient; None where there are none.

        Raises:
            TrainingError: layers of some of them ran.
        """
        if cut := [name for name in without if self.layers.get(name) in self.ran]:
            raise TrainingError(
                f"{len(cut)} of {len(self.layers)} trained parameters got no gradient, although their layers "
                "ran.",
                problems=cut[:10],
                meaning="They would never learn: between these layers and the loss something cuts the graph, "
                "or nothing reads what they give.",
                fix="Leave these layers out (method.exclude_modules, method.target_modules).",
            )
        without = [name for name in without if name in self.seen]
        if not without:
            return None
        return (
            f"{len(without)} of {len(self.layers)} trained parameters got no gradient in the first step, as "
            f"their layers did not run: {', '.join(list(without)[:_SHOWN])}."
        )


@contextmanager
def watched(model: nn.Module, names: Collection[str]) -> Iterator[FirstStep]:
    """Inside, the layers of the named parameters note that they run."""
    modules = dict(model.named_modules())
    found = FirstStep({name: _layer(name, modules) for name in names})
    with ExitStack() as stack:
        for path in set(found.layers.values()):
            stack.callback(modules[path].register_forward_hook(_note(found.ran, path)).remove)
        yield found


def _model_of(path: str) -> str:
    """Which one of several models a layer belongs to; the same for all layers where there is but one."""
    return path.partition(".")[0] if path.startswith(SEVERAL) else ""


def _layer(name: str, modules: Collection[str]) -> str:
    """The innermost module that a parameter's name leads through."""
    path = name
    while path and path not in modules:
        path = path.rpartition(".")[0]
    return path


def _note(ran: set[str], path: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        ran.add(path)

    return hook
