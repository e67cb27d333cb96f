"""The fields that every method on layers shares: which layers it goes to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import field_validator
from torch import nn

from graftlm.methods import targets
from graftlm.methods.base import Layer, Maker, MethodConfig, SiteAdapter


class LayerConfig(MethodConfig):
    """A method that adapts single layers, chosen by role, name or expression."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """Where the adapter goes: a role (`all-linear`, `attention`, `mlp`), a list of roles and of module names
    or endings of them, or one regular expression for the whole path."""
    exclude_modules: str | tuple[str, ...] | None = None
    """Same grammar; wins over `target_modules`."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Only these layers, counted from 0."""
    layers_pattern: str | tuple[str, ...] | None = None
    """Name of the list of layers, for models where the first number of a path is something else."""

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _sets_are_sorted(cls, value: Any) -> Any:
        return tuple(sorted(value)) if isinstance(value, set | frozenset) else value

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or any(not name for name in value):
            raise ValueError("names no module; use 'all-linear', a role, or module names")
        return value

    @abstractmethod
    def supports(self, module: nn.Module) -> bool:
        """Whether this method can adapt a module of this kind."""

    @abstractmethod
    def build(self, layer: Layer) -> SiteAdapter:
        """One adapter for one layer, initialised."""

    def extra(self, model: nn.Module, chosen: Sequence[str]) -> Mapping[str, Maker]:
        """Further places beside the `chosen` ones: path to a function that makes the part there."""
        return {}

    def places(self, model: nn.Module) -> Mapping[str, Maker]:
        chosen = targets.select(model, self) if self.target_modules else []
        return {**dict.fromkeys(chosen, self.build), **self.extra(model, chosen)}
