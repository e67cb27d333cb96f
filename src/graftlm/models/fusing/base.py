"""What a faster way is: forwards of modules that are exchanged for the time of a training.

A module qualifies by what it computes, never by its architecture's name: a probe must give the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftlm.quant.facts import device_of, dtype_of

Forward = Callable[..., Any]


class FasterPart(Protocol):
    """One kind of part of a model, found and probed, not yet in use."""

    @property
    def summary(self) -> str:
        """How many of how many run the faster way, and why the others do not: "5 of 5 norms"."""
        ...

    def in_use(self) -> AbstractContextManager[None]:
        """Inside, these parts run the faster way, outside as before."""
        ...


@dataclass(frozen=True)
class Exchanged:
    """Modules of one kind (`what`, in the plural), `total` of them, and the forwards that stand in."""

    what: str
    total: int
    forwards: Mapping[nn.Module, Forward]

    @property
    def summary(self) -> str:
        """As every `FasterPart`.

        >>> Exchanged("norms", 5, {}).summary
        '0 of 5 norms'
        """
        return f"{len(self.forwards)} of {self.total} {self.what}"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The forwards are put on the modules themselves, and taken off again."""
        for module, forward in self.forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in self.forwards:
                del module.forward  # the one of its class is back


def untouched(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward is that of their class."""
    return [module for module in model.modules() if "forward" not in vars(module)]


def agreeing(
    candidates: Mapping[nn.Module, Forward], probe: Callable[[nn.Module], Tensor]
) -> dict[nn.Module, Forward]:
    """Those whose class passed: one module of it, called with its `probe`, stands for all."""
    passed: dict[type[nn.Module], bool] = {}
    for module, forward in candidates.items():
        if type(module) not in passed:
            passed[type(module)] = _agrees(module, forward, probe(module))
    return {module: forward for module, forward in candidates.items() if passed[type(module)]}


@torch.no_grad()
def _agrees(module: nn.Module, forward: Forward, x: Tensor) -> bool:
    """Whether both give the same, with everything random switched off. Products of 16-bit matrices need not
    repeat to the last bit."""
    was_training = module.training
    module.eval()
    try:
        expected, found = module(x), forward(x)
    except (TypeError, ValueError, RuntimeError):  # it takes more than one tensor
        return False
    finally:
        module.train(was_training)
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    difference, size = (found - expected).float().norm(dim=-1), expected.float().norm(dim=-1)
    return bool((difference <= 2 * torch.finfo(x.dtype).eps * size).all())


def probe_rows(width: int, like: nn.Module) -> Tensor:
    """Three rows of `width` values, small and large (some models clamp), as `like` computes."""
    values = torch.linspace(-2.0, 2.0, 3 * width).view(3, width) * torch.tensor([[1.0], [10.0], [200.0]])
    return values.to(device=device_of(like), dtype=dtype_of(like))
