"""Putting adapters into a model and taking them out again, to the very same objects and flags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from graftlm.methods.base import ModelAdapter, Part, SiteAdapter
from graftlm.methods.place import Composition, Place
from graftlm.methods.site import Site
from graftlm.methods.virtual.attention_gate import AttentionAdapter, AttentionGate
from graftlm.methods.virtual.gate import Gate
from graftlm.methods.virtual.hooked import HookedPlace
from graftlm.quant.foreign_layout import keep_differentiable
from graftlm.quant.weights import WeightHandle


class Installation:
    """The places of one model by the path of the module that each stands at: sites, and gates of stacks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: dict[str, Site] = {}
        self.gates: dict[str, HookedPlace] = {}
        self._holders = _holders(model)
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._trained: frozenset[str] = frozenset()
        self._allow_other_layouts = keep_differentiable(model)
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)

    @property
    def places(self) -> Iterator[tuple[str, Place]]:
        """Every gate and every site by path."""
        yield from self.gates.items()
        yield from self.sites.items()

    def parts(self, name: str) -> dict[str, Part]:
        """The parts of one adapter by path: gates first, then sites in model order."""
        return {path: place.adapter(name) for path, place in self.places if place.has(name)}

    def install(self, name: str, parts: Mapping[str, Part]) -> None:
        """Put every part at its path, frozen; a place is made where there is none yet."""
        for path, part in parts.items():
            part.requires_grad_(False)
            if isinstance(part, ModelAdapter):
                self._gate(path, part).put(name, part)
            else:
                assert isinstance(part, SiteAdapter)
                self._site(path).put(name, part)
        self.sites = {path: self.sites[path] for path in self._holders if path in self.sites}

    def remove(self, name: str) -> None:
        """The inverse of `install`; places without any adapter leave the model."""
        for path, place in list(self.places):
            if place.has(name):
                place.drop(name)
            if place.is_empty:
                self._clear(path, place)
        self._trained -= {name}

    def uninstall(self) -> None:
        """Every original module object back in its place, every flag as it was."""
        for path, place in list(self.places):
            self._clear(path, place)
        self._allow_other_layouts()
        for parameter, required_grad in self._flags:
            parameter.requires_grad_(required_grad)

    def keep_merged(self) -> None:
        """Forget the originals that merges set aside; what stands in their place gets their flags too."""
        flags = {id(parameter): flag for parameter, flag in self._flags}
        for site in self.sites.values():
            held = WeightHandle(site.base_layer).held()
            for key, original in site.originals.items():
                own = held[key]
                if own is not None and original is not None:
                    self._flags.append((own, flags[id(original)]))
            site.originals = {}

    def show(self, names: tuple[str, ...], composition: Composition, *, is_enabled: bool) -> None:
        """Let every place apply those of `names` that it has; no routing either unless `is_enabled`."""
        for _, place in self.places:
            place.shown = tuple(name for name in names if place.has(name))
            place.composition = composition
            place.is_enabled = is_enabled

    def train(self, names: Iterable[str]) -> None:
        """Require gradients of exactly the parts of these adapters."""
        wanted = frozenset(names)
        for name in wanted ^ self._trained:
            for part in self.parts(name).values():
                part.requires_grad_(name in wanted)
        self._trained = wanted

    def _site(self, path: str) -> Site:
        if path not in self.sites:
            self.sites[path] = Site(self.model.get_submodule(path))
            self._place(path, self.sites[path])
        return self.sites[path]

    def _gate(self, path: str, part: ModelAdapter) -> HookedPlace:
        if path not in self.gates:
            kind = AttentionGate if isinstance(part, AttentionAdapter) else Gate
            self.gates[path] = kind(self.model, path)
            self.gates[path].install(self.model)
        return self.gates[path]

    def _clear(self, path: str, place: Place) -> None:
        if isinstance(place, Site):
            self._place(path, place.base_layer)
            del self.sites[path]
        else:
            self.gates.pop(path).uninstall()

    def _place(self, path: str, module: nn.Module) -> None:
        for parent, leaf in self._holders[path]:
            setattr(parent, leaf, module)


def _holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Who holds each module, by its first path: some models hold one module at several places."""
    first_path = {id(module): path for path, module in model.named_modules()}
    holders: dict[str, list[tuple[nn.Module, str]]] = {path: [] for path in first_path.values()}
    for parent in model.modules():
        for leaf, child in parent._modules.items():  # `named_children` would skip a second name
            if child is not None:
                holders[first_path[id(child)]].append((parent, leaf))
    return holders
