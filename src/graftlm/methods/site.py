"""The wrapper at one module path: it always calls the base layer, then applies what is active there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from graftlm.core.errors import AdapterError
from graftlm.methods.base import LayerAdapter, SiteAdapter
from graftlm.quant.weights import WeightHandle


@dataclass(frozen=True)
class Route:
    """Which rows of a batch go to which adapter. `None` is the base; `batch` counts all rows."""

    rows: Mapping[str | None, Tensor]
    batch: int


class Site(nn.Module):
    """A base layer, the adapters that exist there by name, and a read-only view of the current state.

    The state (`shown`, `route`, `is_enabled`) is only ever written by the `AdapterSet` that owns the site.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.shown: tuple[str, ...] = ()
        self.route: Route | None = None
        self.is_enabled = True
        self.originals: dict[str, nn.Parameter] = {}
        self.train(base_layer.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.route is not None and self.is_enabled:
            return self._routed(self.route, x, *args, **kwargs)
        return self._summed([self.adapter(name) for name in self.shown], x, *args, **kwargs)

    def adapter(self, name: str) -> SiteAdapter:
        """The adapter of that name at this site."""
        found = self.adapters[_key(name)]
        assert isinstance(found, SiteAdapter)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter that exists here."""
        return tuple(_name(key) for key in self.adapters)

    def has(self, name: str) -> bool:
        """Whether an adapter of that name exists here."""
        return _key(name) in self.adapters

    def put(self, name: str, adapter: SiteAdapter) -> None:
        """Add an adapter; it is not applied before the owner shows it."""
        self.adapters[_key(name)] = adapter.train(self.training)

    def drop(self, name: str) -> None:
        """The inverse of `put`."""
        del self.adapters[_key(name)]

    @property
    def is_empty(self) -> bool:
        """No adapter is left here."""
        return len(self.adapters) == 0

    def _summed(self, adapters: list[SiteAdapter], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Base output plus the change of each adapter, so that their order never matters."""
        if len(adapters) == 1:
            return adapters[0](self.base_layer, x, *args, **kwargs)
        base = total = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            if _is_additive(adapter):
                total = adapter.post(x, total)
            else:
                total = total + (adapter(self.base_layer, x, *args, **kwargs) - base)
        return total

    def _routed(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows_per_item = self._rows_per_item(route, x)
        output: Tensor = self.base_layer(x, *args, **kwargs)
        for name, rows in route.rows.items():
            if name is None or not self.has(name):
                continue
            index = rows.to(x.device)
            if rows_per_item > 1:
                index = (
                    index[:, None] * rows_per_item + torch.arange(rows_per_item, device=x.device)
                ).flatten()
            adapter, own = self.adapter(name), x.index_select(0, index)
            if _is_additive(adapter):
                part = adapter.post(own, output.index_select(0, index))
            else:
                part = adapter(self.base_layer, own, *args, **kwargs)
            output = output.index_copy(0, index, part)
        return output

    def _rows_per_item(self, route: Route, x: Tensor) -> int:
        """1 for [batch, ...]; the tokens per item where the model flattened [batch, tokens] into one."""
        if x.shape[0] == route.batch:
            return 1
        if x.dim() == 2 and x.is_floating_point() and x.shape[0] % route.batch == 0:
            return x.shape[0] // route.batch
        raise AdapterError(
            f"A routed layer got {x.shape[0]} rows for a batch of {route.batch}.",
            meaning="This layer sees tokens in another order than the batch (experts, for instance).",
            fix="Exclude it with exclude_modules, or run the rows of each adapter in a batch of their own.",
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Site:
        """`.to(...)` reaches the originals that a merge set aside, so that an unmerge puts back what fits."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self.originals.values():
            parameter.data = fn(parameter.data)
        return self

    # What model code reads from a layer without calling it.

    @property
    def weight(self) -> Tensor:
        return self.base_layer.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.base_layer, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def in_features(self) -> int:
        return WeightHandle(self.base_layer).shape[1]

    @property
    def out_features(self) -> int:
        return WeightHandle(self.base_layer).shape[0]


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the path it has without adapters; sites are looked through."""
    found: dict[str, nn.Module] = {}
    inside_site = ""
    for path, module in model.named_modules():
        if inside_site and path.startswith(inside_site):
            continue
        if isinstance(module, Site):
            inside_site = f"{path}."
            found.update({f"{path}.{name}".rstrip("."): m for name, m in module.base_layer.named_modules()})
        else:
            found[path] = module
    return found


def _is_additive(adapter: SiteAdapter) -> TypeGuard[LayerAdapter]:
    """Whether the adapter can act on an existing output, without another call of the base layer."""
    return isinstance(adapter, LayerAdapter) and adapter.is_additive


def _key(name: str) -> str:
    """`nn.ModuleDict` takes neither dots nor names of its own methods; `@` keeps clear of both."""
    return "@" + name.replace(".", "%2E")


def _name(key: str) -> str:
    """The inverse of `_key`."""
    return key[1:].replace("%2E", ".")
