"""Putting sites into a model and taking them out again, to the very same objects and flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from graftlm.methods.base import SiteAdapter
from graftlm.methods.site import Site


class Installation:
    """The sites of one model by the path of the module that each of them wraps, in model order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: dict[str, Site] = {}
        self._holders = _holders(model)
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)

    def install(self, name: str, parts: Mapping[str, SiteAdapter]) -> None:
        """Put every part at its path; a site is made where there is none yet."""
        for path, part in parts.items():
            if path not in self.sites:
                module = self.model.get_submodule(path)
                self.sites[path] = Site(module)
                self._place(path, self.sites[path])
            self.sites[path].put(name, part)
        self.sites = {path: self.sites[path] for path in self._holders if path in self.sites}

    def remove(self, name: str) -> None:
        """The inverse of `install`; sites without any adapter leave the model."""
        for path, site in list(self.sites.items()):
            if site.has(name):
                site.drop(name)
            if site.is_empty:
                self._place(path, site.base_layer)
                del self.sites[path]

    def uninstall(self) -> None:
        """Every original module object back in its place, every flag as it was."""
        for path, site in self.sites.items():
            self._place(path, site.base_layer)
        self.sites = {}
        for parameter, required_grad in self._flags:
            parameter.requires_grad_(required_grad)

    def keep_merged(self) -> None:
        """Forget the originals that merges set aside; what stands in their place gets their flags too."""
        flags = {id(parameter): flag for parameter, flag in self._flags}
        for site in self.sites.values():
            for key, original in site.originals.items():
                self._flags.append((site.base_layer.get_parameter(key), flags[id(original)]))
            site.originals = {}

    def show(self, names: tuple[str, ...], *, is_enabled: bool) -> None:
        """Let every site apply those of `names` that it has; no routing either unless `is_enabled`."""
        for site in self.sites.values():
            site.shown = tuple(name for name in names if site.has(name))
            site.is_enabled = is_enabled

    def train(self, names: Iterable[str]) -> None:
        """Require gradients of exactly the parts of these adapters."""
        trained = set(names)
        for site in self.sites.values():
            for name in site.names:
                site.adapter(name).requires_grad_(name in trained)

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
