"""Fold adapters into the base's weights, all or nothing, and take them out again to the byte.

The originals are set aside as the very same `Parameter` objects, never edited: an unmerge puts them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from graftlm.core.errors import MergeError
from graftlm.core.notices import notice
from graftlm.methods.base import Dense
from graftlm.methods.site import Site
from graftlm.methods.virtual.hooked import HookedPlace
from graftlm.quant.convert import dequantise, is_quantised
from graftlm.quant.facts import dtype_of
from graftlm.quant.weights import Held, WeightHandle


def refuse_gates(gates: Mapping[str, HookedPlace], names: Iterable[str]) -> None:
    """What acts on the input or the cache is no change of weights.

    Raises:
        MergeError: one of the adapters `names` stands at a gate.
    """
    for gate in gates.values():
        for name in names:
            if gate.has(name):
                gate.adapter(name).merged({})


def set_merged(sites: Mapping[str, Site], names: Sequence[str]) -> None:
    """Make the weights of every site hold exactly the adapters `names`; nothing changes if any site refuses.

    Raises:
        MergeError: an adapter is no change of weights, the base is packed, or a weight would not be finite.
    """
    with ExitStack() as rollback:
        for path, site in sites.items():
            rollback.callback(_put_back, site, dict(site.originals), WeightHandle(site.base_layer).held())
            set_site(path, site, [name for name in names if site.has(name)])
        rollback.pop_all()
    _tie_again(sites.values())


def made_dense(model: nn.Module) -> nn.Module:
    """The same model with every layer dense, in place: merged ones as they are, packed ones decoded.

    A merged weight goes into few bits again only by a step of its own (`graft merge --requantize`), which
    says how much of the change is lost.
    """
    if is_quantised(model):
        dequantise(model, dtype_of(model))
    return model


def say_cost(sites: Iterable[Site]) -> None:
    """A merge on a quantised base takes memory: the packed weights stay where they are, for the unmerge."""
    dense = [
        own
        for site in sites
        if "weight" in site.originals and site.originals["weight"] is None
        and (own := WeightHandle(site.base_layer).held()["weight"]) is not None
    ]  # fmt: skip
    if dense:
        size = sum(own.numel() * own.element_size() for own in dense)
        dtype = str(dense[0].dtype).removeprefix("torch.")
        notice(
            f"Merged on a quantised base: {len(dense)} layers hold their weight in {dtype} beside the "
            f"quantised one, {size / 1e6:,.1f} MB more. Unmerging frees it."
        )


def _put_back(site: Site, originals: dict[str, Held], held: dict[str, Held]) -> None:
    WeightHandle(site.base_layer).restore(held)
    site.originals = originals


@contextmanager
def without_merges(sites: Iterable[Site]) -> Iterator[None]:
    """The base's own weights in place for the length of the block, for adapters that start from them."""
    with ExitStack() as merged:
        for site in sites:
            handle = WeightHandle(site.base_layer)
            held = handle.held()
            merged.callback(handle.restore, {key: held[key] for key in site.originals})
            handle.restore(site.originals)
        yield


def set_site(path: str, site: Site, names: Sequence[str]) -> None:
    """Make the weights of one site hold exactly the adapters `names`."""
    handle = WeightHandle(site.base_layer)
    handle.restore(site.originals)
    site.originals = {}
    if names:
        handle.require_dense()
        site.originals = handle.replace(merged_tensors(path, site, handle.read(), names))


@torch.no_grad()
def merged_tensors(path: str, site: Site, dense: Dense, names: Sequence[str]) -> dict[str, Tensor]:
    """Base plus the sum of the changes of each adapter, in float32 or better."""
    total: dict[str, Tensor] = {}
    for name in names:
        for key, value in site.adapter(name).merged(dense).items():
            total[key] = value if key not in total else total[key] + (value - dense[key])
            _require_finite(total[key], name, f"{path}.{key}", WeightHandle(site.base_layer).dtype_of(key))
    return total


def _require_finite(value: Tensor, name: str, key: str, dtype: torch.dtype) -> None:
    if not torch.isfinite(value.to(dtype)).all():
        raise MergeError(
            f"Merging adapter {name!r} would put NaN or infinity into {key}.",
            meaning="The adapter's training diverged, or its values overflow the base's dtype.",
            fix="Evaluate the adapter before merging; load the base in bfloat16 or float32 if it is float16.",
        )


def _tie_again(sites: Iterable[Site]) -> None:
    """One parameter for a tied weight whose every place was changed in the same way, as token rows do."""
    merged: dict[int, nn.Parameter] = {}
    for site in sites:
        handle = WeightHandle(site.base_layer)
        for key, own in _in_place_of_dense(site).items():
            other = merged.setdefault(id(site.originals[key]), own)
            if torch.equal(own, other):
                handle.restore({key: other})


def _in_place_of_dense(site: Site) -> dict[str, nn.Parameter]:
    """What stands where a parameter was set aside; packed weights are not tied to anything."""
    held = WeightHandle(site.base_layer).held()
    return {
        key: own
        for key, original in site.originals.items()
        if original is not None and (own := held[key]) is not None
    }


def splits_a_tie(model: nn.Module, sites: Iterable[Site]) -> bool:
    """Whether a merge gave a weight that two modules held in common, as tied embeddings are, two values."""
    now: dict[int, set[int]] = {}
    for site in sites:
        for key, own in _in_place_of_dense(site).items():
            now.setdefault(id(site.originals[key]), set()).add(id(own))
    still_held = {id(parameter) for parameter in model.parameters()}
    return any(len(parameters) > 1 for parameters in now.values()) or not still_held.isdisjoint(now)
