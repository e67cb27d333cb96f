"""Somewhere in a model where adapters act: their parts by name, and a read-only view of what applies now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from graftlm.methods.base import Part
from graftlm.methods.lanes import Lanes

Composition = Literal["sum", "stack"]
"""How several active adapters act together: the base plus the change of each, or one upon the other."""


@dataclass(frozen=True)
class Route:
    """Which rows of a batch go to which adapter. `None` is the base; `batch` counts all rows."""

    rows: Mapping[str | None, Tensor]
    batch: int


class Place(nn.Module):
    """The parts that stand at one module.

    The state (`shown`, `composition`, `route`, `lanes`, `is_enabled`) is only ever written by the owner of
    the place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.shown: tuple[str, ...] = ()
        self.composition: Composition = "sum"
        self.route: Route | None = None
        self.lanes: Lanes | None = None
        self.is_enabled = True

    def adapter(self, name: str) -> Part:
        """The part of the adapter of that name."""
        found = self.adapters[_key(name)]
        assert isinstance(found, Part)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter that exists here."""
        return tuple(_name(key) for key in self.adapters)

    def has(self, name: str) -> bool:
        """Whether an adapter of that name exists here."""
        return _key(name) in self.adapters

    def put(self, name: str, part: Part) -> None:
        """Add a part; it is not applied before the owner shows it."""
        self.adapters[_key(name)] = part.train(self.training)

    def drop(self, name: str) -> None:
        """The inverse of `put`."""
        del self.adapters[_key(name)]

    @property
    def is_empty(self) -> bool:
        """No adapter is left here."""
        return len(self.adapters) == 0


def _key(name: str) -> str:
    """`nn.ModuleDict` takes neither dots nor names of its own methods; `@` keeps clear of both."""
    return "@" + name.replace(".", "%2E")


def _name(key: str) -> str:
    """The inverse of `_key`."""
    return key[1:].replace("%2E", ".")
