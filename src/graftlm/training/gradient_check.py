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


@dataclass
class FirstStep:
    """The layers that trained parameters stand at, and those of them that have run."""

    layers: dict[str, str]
    ran: set[str] = field(default_factory=set)

    def judge(self, without: Collection[str]) -> str | None:
        """What to say about the parameters `without` a gradient; None where there are none.

        Raises:
            TrainingError: layers of some of them ran.
        """
        if cut := [name for name in without if self.layers[name] in self.ran]:
            raise TrainingError(
                f"{len(cut)} of {len(self.layers)} trained parameters got no gradient, although their layers "
                "ran.",
                problems=cut[:10],
                meaning="They would never learn: between these layers and the loss something cuts the graph, "
                "or nothing reads what they give.",
                fix="Leave these layers out (method.exclude_modules, method.target_modules).",
            )
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
