"""The wrapper at one module path: it always calls the base layer, then applies what is active there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from graftlm.core.errors import AdapterError
from graftlm.kernels.adapted import Adapted
from graftlm.kernels.stacked import Stacked, linears
from graftlm.methods import in_lanes
from graftlm.methods.base import LayerAdapter, SiteAdapter, WeightAdapter
from graftlm.methods.in_lanes import refuse_arguments
from graftlm.methods.lanes import Lanes
from graftlm.methods.place import Place, Route
from graftlm.quant.frozen import frozen
from graftlm.quant.weights import Held, WeightHandle


class Site(Place):
    """A base layer and the adapters that exist there by name."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.originals: dict[str, Held] = {}
        self._input_name = next(iter(inspect.signature(base_layer.forward).parameters), "input")
        self.train(base_layer.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, *rest = args or (kwargs.pop(self._input_name),)  # attention is called by keywords only
        if self.route is not None and self.is_enabled:
            return self._routed(self.route, x, *rest, **kwargs)
        one = None if rest or kwargs else self.adapted(x)
        if one is not None:
            return linears(x, [one])[0]
        if (lanes := self._lanes) is not None:
            refuse_arguments(rest, kwargs)
            return in_lanes.output(self.base_layer, self._part, lanes, x)
        adapters = [self.adapter(name) for name in self.shown]
        if len(adapters) == 1 and not self.originals:
            return adapters[0](self.base_layer, x, *rest, **kwargs)
        compose = self._summed if self.composition == "sum" else self._stacked
        return compose(adapters, x, *rest, **kwargs)

    def adapted(self, x: Tensor) -> Adapted | Stacked | None:
        """What `forward` computes of x as one product (`kernels.adapted`), where it is one: the layer as it
        came, and a single adapter of a kind that can be part of it, or one for each lane of x."""
        if self.originals or (self.route is not None and self.is_enabled):
            return None
        if (lanes := self._lanes) is not None:
            return in_lanes.product(self.base_layer, self._part, lanes, x)
        layer = frozen(self.base_layer, x) if len(self.shown) == 1 else None
        return None if layer is None else self.adapter(self.shown[0]).change_of(layer, self.base_layer)

    @property
    def _lanes(self) -> Lanes | None:
        """Those that apply now."""
        applies = self.lanes is not None and self.lanes.applies and self.is_enabled
        return self.lanes if applies else None

    def _part(self, name: str) -> SiteAdapter | None:
        return self.adapter(name) if self.has(name) else None

    def adapter(self, name: str) -> SiteAdapter:
        """The part of the adapter of that name."""
        found = super().adapter(name)
        assert isinstance(found, SiteAdapter)
        return found

    def _summed(self, adapters: list[SiteAdapter], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Base output plus the change of each adapter, so that their order never matters.

        The change of an adapter is what it does to the base as it came, whatever is merged into it by now.
        """
        on_weights, others = _on_weights(adapters)
        base = total = self._with_weights(on_weights, x, *args, **kwargs)
        if (self.originals or on_weights) and not all(map(_is_additive, others)):
            base = self.original(x, *args, **kwargs)
        for adapter in others:
            if _is_additive(adapter):
                total = adapter.post(x, total)
                continue
            if _acts_on_output(adapter):
                own = adapter.post(x, base)
            else:
                layer: Any = _Layer(self.original, self.base_layer, self.originals)
                own = adapter(layer, x, *args, **kwargs)
            total = tree_map(_with_change, total, own, base)
        return total

    def _with_weights(self, adapters: Sequence[WeightAdapter], *args: Any, **kwargs: Any) -> Any:
        """The base layer as it is now, with the changes of all these adapters in its weights."""
        handle = WeightHandle(self.base_layer)
        if not adapters:
            if self.originals and handle.is_packed:  # a layer of bitsandbytes does not look at the merged one
                return handle.call({}, *args, **kwargs)
            return self.base_layer(*args, **kwargs)
        weights = handle.tensors()
        for adapter in adapters:
            weights |= adapter.changed(weights)
        return handle.call(weights, *args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer with its own weights, also while others stand in their place."""
        if not self.originals:
            return self.base_layer(*args, **kwargs)
        return WeightHandle(self.base_layer).call(self.originals, *args, **kwargs)

    def _stacked(self, adapters: list[SiteAdapter], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Each adapter takes the layer as the ones before it left it."""
        on_weights, others = _on_weights(adapters)
        layer = _Layer(partial(self._with_weights, on_weights), self.base_layer)
        for adapter in others:
            layer = _Layer(partial(adapter, layer), self.base_layer)
        return layer(x, *args, **kwargs)

    def _routed(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.shape[0] == 1 < route.batch:  # the same for every row, as position ids are
            x = x.expand(route.batch, *x.shape[1:])
        rows_per_item = self._rows_per_item(route, x)
        output = tree_map(partial(_for_rows, len(x)), self.base_layer(x, *args, **kwargs))
        if not _goes_along(output[0] if isinstance(output, tuple) else output, len(x)):
            raise _not_by_row("gave something else than a row for each row of its input")
        for name, rows in route.rows.items():
            if name is None or not self.has(name):
                continue
            index = rows.to(x.device)
            if rows_per_item > 1:
                index = (
                    index[:, None] * rows_per_item + torch.arange(rows_per_item, device=x.device)
                ).flatten()
            adapter, own = self.adapter(name), x.index_select(0, index)
            if _acts_on_output(adapter):
                part = adapter.post(own, _rows_of(output, index, len(x)))
            else:
                own_args, own_kwargs = _rows_of((args, kwargs), index, len(x))
                part = adapter(self.base_layer, own, *own_args, **own_kwargs)
            output = tree_map(partial(_with_rows, index, len(x)), output, part)
        return output

    def _rows_per_item(self, route: Route, x: Tensor) -> int:
        """1 for [batch, ...]; the tokens per item where the model flattened [batch, tokens] into one."""
        if x.shape[0] == route.batch:
            return 1
        if x.dim() == 2 and x.is_floating_point() and x.shape[0] % route.batch == 0:
            return x.shape[0] // route.batch
        raise _not_by_row(f"got {x.shape[0]} rows for a batch of {route.batch}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Site:
        """`.to(...)` reaches the originals that a merge set aside, so that an unmerge puts back what fits."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for original in self.originals.values():
            if original is not None:  # a packed weight is still where it was
                original.data = fn(original.data)
        return self

    # What model code reads from a layer without calling it.

    @property
    def weight(self) -> Tensor:
        weight = self.base_layer.weight  # a packed layer reads it out at every call
        assert isinstance(weight, Tensor)
        return weight

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


class _Layer:
    """A layer as an adapter sees it: called in another way, with its own facts otherwise.

    Parameters that are `its_own` are seen in the place of those that the layer has now.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        layer: nn.Module,
        its_own: Mapping[str, Held] = MappingProxyType({}),
    ) -> None:
        self.call, self.stands_for, self.its_own = call, layer, its_own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        own = self.its_own.get(name)
        return getattr(self.stands_for, name) if own is None else own

    def get_parameter(self, name: str) -> nn.Parameter:
        """As of the layer that this stands for."""
        own = self.its_own.get(name)
        return self.stands_for.get_parameter(name) if own is None else own


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the path it has without adapters; sites are looked through."""
    seen: set[int] = set()
    return dict(_walk(model, "", seen))


def parents(path: str) -> list[str]:
    """Paths of the modules around one, from the outside in.

    >>> parents("model.layers.0")
    ['model', 'model.layers']
    """
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but never into adapters, of which there may be many."""
    if isinstance(module, Site):
        module = module.base_layer
    if id(module) in seen or isinstance(module, Place):
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _on_weights(adapters: Sequence[SiteAdapter]) -> tuple[list[WeightAdapter], list[SiteAdapter]]:
    """Adapters that change what the base layer is called with, and the others."""
    inside = [adapter for adapter in adapters if isinstance(adapter, WeightAdapter)]
    return inside, [adapter for adapter in adapters if not isinstance(adapter, WeightAdapter)]


def _not_by_row(what: str) -> AdapterError:
    return AdapterError(
        f"A routed layer {what}.",
        meaning="This layer sees tokens in another order than the batch (experts, for instance).",
        fix="Exclude it with exclude_modules, or run the rows of each adapter in a batch of their own.",
    )


def _acts_on_output(adapter: SiteAdapter) -> TypeGuard[LayerAdapter]:
    """Whether the adapter leaves the base's input alone, so that one output of the base serves several."""
    return isinstance(adapter, LayerAdapter) and type(adapter).pre is LayerAdapter.pre


def _is_additive(adapter: SiteAdapter) -> TypeGuard[LayerAdapter]:
    """Whether the adapter may act upon the output of another without changing what either adds."""
    return _acts_on_output(adapter) and adapter.is_additive


def _with_change(total: Any, own: Any, base: Any) -> Any:
    """One of the base layer's outputs plus what an adapter changes of it."""
    return total + (own - base) if isinstance(total, Tensor) and total.is_floating_point() else total


def _for_rows(rows: int, output: Any) -> Any:
    """One of the base layer's outputs, with a row of its own for every row of the input."""
    if isinstance(output, Tensor) and output.dim() and output.shape[0] == 1 < rows:
        return output.expand(rows, *output.shape[1:])
    return output


def _with_rows(index: Tensor, rows: int, output: Any, part: Any) -> Any:
    """One of the base layer's outputs with some rows as an adapter gives them."""
    return output.index_copy(0, index, _for_rows(len(index), part)) if _goes_along(output, rows) else output


def _rows_of(arguments: Any, index: Tensor, rows: int) -> Any:
    """Arguments that go with the rows of the input are chosen with them; what all rows share stays whole."""

    def chosen(value: Any) -> Any:
        return value.index_select(0, index) if _goes_along(value, rows) else value

    return tree_map(chosen, arguments)


def _goes_along(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
