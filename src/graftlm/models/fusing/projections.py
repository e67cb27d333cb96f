"""Adapted linear layers that read the very same tensor, in one node: queries, keys and values; gate and up.

Which layers those are is seen in a pass of a few tokens. Later the first of them that is called computes all,
and the others find their output waiting. A layer that is called with another tensor, or twice, or not at all,
costs time and changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.kernels.stacked import linears
from graftlm.methods.families import is_linear
from graftlm.methods.site import Site
from graftlm.models.fusing.base import Forward
from graftlm.quant.facts import device_of

TOKENS = 3
"""Of the pass in which layers are observed."""


@dataclass(frozen=True)
class Projections:
    """Adapted linear layers, those that are one product with their change, and those that share an input."""

    total: int
    whole: int
    groups: Sequence[tuple[nn.Module, tuple[Site, ...]]]
    """The module around them, and the layers."""

    @property
    def summary(self) -> str:
        """As every `FasterPart`."""
        together = sum(len(sites) for _, sites in self.groups)
        return (
            f"{self.whole} of {self.total} adapted linear layers ({together} of them in {len(self.groups)} "
            "groups with one input)"
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """As every `FasterPart`."""
        with ExitStack() as stack:
            for around, sites in self.groups:
                stack.enter_context(_together(around, sites))
            yield


def projections(model: nn.Module) -> Projections:
    """The adapted linear layers of a model."""
    sites = {path: module for path, module in model.named_modules() if isinstance(module, Site)}
    seen = _observed(model, sites) if any(site.shown or site.lanes for site in sites.values()) else {}
    whole = [path for path, call in seen.items() if call.is_whole]
    alike: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for path in whole:
        if seen[path].count == 1:
            alike[path.rpartition(".")[0], id(seen[path].x)].append(path)
    groups = [
        (model.get_submodule(around), tuple(sites[path] for path in paths))
        for (around, _), paths in alike.items()
        if len(paths) > 1
    ]
    total = sum(is_linear(site.base_layer) for site in sites.values())
    return Projections(total, len(whole), groups)


@dataclass
class _Call:
    """What a layer was called with last; held, so that no other tensor gets its identity."""

    x: Tensor
    is_whole: bool
    count: int = 1


def _observed(model: nn.Module, sites: dict[str, Site]) -> dict[str, _Call]:
    """How each layer is called in a pass of a few tokens; empty where the model wants more than tokens."""
    seen: dict[str, _Call] = {}

    def note(path: str) -> Any:
        def hook(site: Site, args: tuple[Any, ...]) -> None:
            if len(args) != 1:
                return
            with torch.enable_grad():
                is_whole = site.adapted(args[0]) is not None
            count = seen[path].count + 1 if path in seen else 1
            seen[path] = _Call(args[0], is_whole, count)

        return hook

    in_training = [module for module in model.modules() if module.training]
    with ExitStack() as stack, torch.no_grad():
        for path, site in sites.items():
            stack.callback(site.register_forward_pre_hook(note(path)).remove)
        try:
            model.eval()(input_ids=torch.arange(TOKENS, device=device_of(model)).unsqueeze(0))
        except (TypeError, ValueError):  # it wants more than tokens
            return {}
        finally:
            for module in in_training:
                module.training = True
    return seen


@contextmanager
def _together(around: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Inside, these layers are computed together. Whatever waits when `around` returns is forgotten."""
    group = _Group(sites)
    before = {site: vars(site).get("forward") for site in sites}
    hook = around.register_forward_hook(lambda *_: group.forget())  # always_call would end in compiled code
    for site in sites:
        site.forward = group.forward_of(site)  # type: ignore[method-assign]
    try:
        yield
    finally:
        hook.remove()
        group.forget()
        for site, forward in before.items():
            if forward is None:
                del site.forward
            else:
                site.forward = forward  # type: ignore[method-assign]


class _Group:
    """Layers that are computed together, and the outputs that wait for their layer to be called."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.forget()

    def forget(self) -> None:
        """Nothing waits any more."""
        self.key: tuple[Any, ...] = ()
        self.waiting: dict[Site, Tensor] = {}

    def forward_of(self, site: Site) -> Forward:
        """Stands in for that of the layer."""
        alone = site.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = self.output_of(site, args[0]) if len(args) == 1 and not kwargs else None
            return alone(*args, **kwargs) if output is None else output

        return forward

    def output_of(self, site: Site, x: Tensor) -> Tensor | None:
        """What the layer gives for `x`; None where it has to be computed alone."""
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        key = (x, x._version, torch.is_grad_enabled())
        is_same = bool(self.key) and x is self.key[0] and key[1:] == self.key[1:]
        if not is_same or site not in self.waiting:
            self.forget()
            ones = [adapted for one in self.sites if (adapted := one.adapted(x)) is not None]
            if len(ones) < len(self.sites):
                return None
            self.key = key
            self.waiting = dict(zip(self.sites, linears(x, ones), strict=True))
        output = self.waiting.pop(site)
        if not self.waiting:
            self.forget()
        return output
