"""Put a merged model into few bits again, and say how much of the adapter's change that leaves.

Rounding to few bits forgets whatever is smaller than the distance between two codes: W + dW mostly rounds to
what W rounds to. For a layer whose weight goes from Q(W) to Q(W + dW), the part of dW that is kept is

    <Q(W + dW) - Q(W), dW> / <dW, dW>        1: all of it; 0: the adapter is gone

and what is there beside it is noise, which `error` counts too. On a base that is stored by the same scheme,
Q(W) is W itself, and W lies in the middle between the values that round to it: small changes vanish. A W that
is on no code keeps its change on average, under noise of the size of the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import MergeError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.merge import merged_tensors, without_merges
from graftlm.methods.site import Site
from graftlm.quant.convert import dense_weight, packed_layer, quantisable, quantised_layers
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import PackedWeight, encode
from graftlm.quant.scheme import Scheme
from graftlm.quant.weights import WeightHandle

MIN_KEPT = 0.9
"""Below this a requantised merge is refused (docs/results/qlora.md)."""


@dataclass(frozen=True)
class LayerChange:
    """What became of the change of one layer, as sums over its weights."""

    change: float
    """<dW, dW>"""
    weight: float
    """<W, W>"""
    along: float
    """<Q(W + dW) - Q(W), dW>"""
    missed: float
    """|Q(W + dW) - (W + dW)|^2"""


@dataclass(frozen=True)
class KeptChange:
    """How much of an adapter's change a requantised merge holds, by layer and over all layers."""

    layers: Mapping[str, LayerChange]

    @property
    def kept(self) -> float:
        """The part of dW that is still there, over all layers."""
        return _ratio(sum(c.along for c in self.layers.values()), sum(c.change for c in self.layers.values()))

    @property
    def error(self) -> float:
        """|Q(W + dW) - (W + dW)| / |dW|: how far the stored weights are from the merged ones."""
        missed = sum(c.missed for c in self.layers.values())
        return math.sqrt(_ratio(missed, sum(c.change for c in self.layers.values())))

    @property
    def size(self) -> float:
        """|dW| / |W| over all layers."""
        total = sum(c.change for c in self.layers.values())
        return math.sqrt(_ratio(total, sum(c.weight for c in self.layers.values())))

    @property
    def least(self) -> tuple[str, float]:
        """The layer that keeps least of its change, and how much."""
        kept = {path: _ratio(c.along, c.change) for path, c in self.layers.items()}
        worst = min(kept, key=lambda path: kept[path])
        return worst, kept[worst]

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        by_layer = {path: round(_ratio(c.along, c.change), 6) for path, c in self.layers.items()}
        return {"kept": self.kept, "error": self.error, "size": self.size, "kept_by_layer": by_layer}

    def __str__(self) -> str:
        path, kept = self.least
        return (
            f"{100 * self.kept:.1f} % of the adapter's change kept (least: {100 * kept:.1f} % in {path}), "
            f"off by {self.error:.2f} of it; the change is {100 * self.size:.2f} % of the weights"
        )


@torch.no_grad()
def requantised(adapters: AdapterSet, scheme: Scheme, *, at_least: float = MIN_KEPT) -> KeptChange:
    """Merge what is active into weights of this scheme. The model is then a quantised base without adapters.

    Every layer that `quantisable` names (or that is packed already) is stored by `scheme`; what else an
    adapter changes stays dense. One layer at a time is dense in memory.

    Raises:
        MergeError: less than `at_least` of the change would be kept; nothing is changed.
    """
    model = adapters.model
    wanted = tuple(dict.fromkeys((*adapters.merged, *adapters.active)))
    with without_merges(_sites(model).values()):
        packed, layers = _encoded(model, scheme, wanted)
    found = KeptChange(layers)
    if layers and not found.kept >= at_least:
        raise MergeError(
            f"Requantising to {scheme.kind} keeps {100 * found.kept:.1f} % of the adapter's change "
            f"(at least {100 * at_least:.0f} % is asked for).",
            problems=_worst(layers),
            meaning=f"The change is {100 * found.size:.2f} % of the weights, and codes of {scheme.kind} lie "
            "farther apart: many weights round to what they were, and that part of the adapter is gone.",
            fix="Merge without requantising, or serve the adapter unmerged; force insists.",
        )
    adapters.unmerge()
    _put_in(model, packed, wanted)
    adapters.activate(wanted)
    _store_the_rest(adapters.fold(), scheme)
    return found


def _put_in(model: nn.Module, packed: Mapping[str, PackedWeight], names: Sequence[str]) -> None:
    """These weights in place of those of the layers, and no adapter there any more."""
    for path, site in _sites(model).items():
        if path not in packed:
            continue
        handle, own = WeightHandle(site.base_layer), [name for name in names if site.has(name)]
        changed = merged_tensors(path, site, handle.read(), own)
        handle.replace({key: value for key, value in changed.items() if key != "weight"})
        if isinstance(site.base_layer, QuantisedLinear):
            site.base_layer.fill(packed[path])
        else:
            site.base_layer = packed_layer(site.base_layer, packed[path])
        for name in own:
            site.drop(name)


def _store_the_rest(model: nn.Module, scheme: Scheme) -> None:
    """What no adapter changes: packed layers of this scheme stay as they are."""
    for path, module in quantisable(model).items():
        packed = encode(dense_weight(module), scheme, name=f"{path}.weight")
        model.set_submodule(path, packed_layer(module, packed))
    for path, layer in quantised_layers(model).items():
        if layer.scheme != scheme:
            layer.fill(encode(layer.packed.decode(), scheme, name=f"{path}.weight"))


def _sites(model: nn.Module) -> dict[str, Site]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Site)}


def _encoded(
    model: nn.Module, scheme: Scheme, names: Sequence[str]
) -> tuple[dict[str, PackedWeight], dict[str, LayerChange]]:
    """The packed weight of every layer that the adapters change, and what that keeps."""
    packed, layers = {}, {}
    dense_layers = _dense_layers(model)
    for path, site in _sites(model).items():
        handle = WeightHandle(site.base_layer)
        if not handle.is_packed and path not in dense_layers:
            continue
        before = handle.read()
        after = merged_tensors(path, site, before, [name for name in names if site.has(name)])
        if "weight" in after:
            packed[path] = encode(after["weight"], scheme, name=f"{path}.weight")
            layers[path] = _compared(handle, before["weight"], after["weight"], packed[path])
    return packed, layers


def _dense_layers(model: nn.Module) -> set[str]:
    """Paths of dense layers that are to be packed: as of the model without its sites."""
    return {path.removesuffix(".base_layer") for path in quantisable(model)}


def _compared(handle: WeightHandle, before: Tensor, after: Tensor, packed: PackedWeight) -> LayerChange:
    is_stored_so = handle.is_packed and handle.packed.scheme == packed.scheme
    start = before if is_stored_so else encode(before, packed.scheme).decode()
    change, now = after - before, packed.decode()
    return LayerChange(
        change=_sum(change.square()),
        weight=_sum(before.square()),
        along=_sum((now - start) * change),
        missed=_sum((now - after).square()),
    )


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _ratio(part: float, whole: float) -> float:
    """1 where there is no change to lose."""
    return part / whole if whole else 1.0


def _worst(layers: Mapping[str, LayerChange]) -> list[str]:
    kept = sorted((_ratio(c.along, c.change), path) for path, c in layers.items())
    return [f"{path}: {100 * share:.1f} %" for share, path in kept[:5]]
