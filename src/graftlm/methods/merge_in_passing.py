"""What a merged model computes, without the memory of one: each layer is merged while it runs.

On a quantised base the merged weights are dense, several times larger than what they stand in for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.merge import set_site
from graftlm.methods.site import Site


@contextmanager
def merged_in_passing(adapters: AdapterSet) -> Iterator[None]:
    """Inside, a forward pass computes as after `adapters.merge()`, with one layer merged at a time.

    Raises:
        MergeError: a method that cannot be merged, here or in the forward pass inside.
    """
    names, sites = adapters.active, _sites(adapters)
    with ExitStack() as hooks:
        hooks.enter_context(adapters.disabled())
        for path, site in sites.items():
            before, after = _around(path, site, [name for name in names if site.has(name)])
            hooks.callback(site.register_forward_pre_hook(before).remove)
            hooks.callback(site.register_forward_hook(after, always_call=True).remove)
        yield


def _sites(adapters: AdapterSet) -> dict[str, Site]:
    found = {}
    for name in adapters.active:
        for path, part in adapters.parts(name).items():
            module = adapters.model.get_submodule(path)
            if isinstance(module, Site):
                found[path] = module
            else:
                part.merged({})  # what acts on the input or the cache is no change of weights, and says so
    return found


def _around(path: str, site: Site, names: Sequence[str]) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(module: nn.Module, args: Any) -> None:
        set_site(path, site, names)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        set_site(path, site, [])

    return before, after
