"""Properties of several adapters on one model: side by side in one batch, and upon each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graftlm.core.errors import AdapterError
from graftlm.methods.site import Site
from graftlm.testing.case import Adapted, Case, stir
from graftlm.testing.expect import expect, expect_close, expect_equal, expect_refusal
from graftlm.testing.learning import checkpoint_activations, gradients
from graftlm.testing.snapshot import snapshot

ROWS = ("a", None, "other", "b", "a")
"""Two adapters of the method, one of another type, and the base, in one batch."""

Call = tuple[Site, tuple[Any, ...], dict[str, Any]]


def several(case: Case) -> None:
    """Adapters of this method and of another live on one model; switching and deleting leaves the others."""
    adapted = mixed(case)
    adapters = adapted.adapters
    alone = {}
    for name in adapters.names:
        adapters.activate(name)
        alone[name] = adapted.logits()
        adapters.activate(name, how="stack")
        expect_equal(adapted.logits(), alone[name], f"logits of {name} stacked on nothing")
    for how in ("sum", "stack"):
        adapters.activate(["a", "b", "other"], how="sum" if how == "sum" else "stack")
        together = adapted.logits()
        expect(bool(torch.isfinite(together).all()), f"logits of three adapters ({how}) are not finite")
        for name, found in alone.items():
            expect(
                not torch.equal(found, together), f"two more adapters ({how}) beside {name} change nothing"
            )
    for name, found in alone.items():
        adapters.activate(name)
        expect_equal(adapted.logits(), found, f"logits of {name} after others were active")
    adapters.delete("a")
    adapters.activate("b")
    expect_equal(adapted.logits(), alone["b"], "logits of b after a was deleted")


def summed(case: Case) -> None:
    """At every layer, the change of two active adapters is the sum of their changes, in either order."""
    adapted = case.adapted("a", "b")
    calls = _calls(adapted)
    expect(bool(calls), "no layer is adapted")
    found = {names: _outputs(adapted, names, calls) for names in ((), ("a",), ("b",), ("a", "b"), ("b", "a"))}
    for number, base in enumerate(found[()]):
        wanted = found["a",][number] + (found["b",][number] - base)
        for order in (("a", "b"), ("b", "a")):
            expect_close(found[order][number], wanted, f"the change of {' and '.join(order)} at a layer")


def without_sites(case: Case) -> str:
    """Why there is no layer whose change could be summed, or nothing."""
    model = case.untrained().model
    has_site = any(isinstance(module, Site) for module in model.modules())
    return "" if has_site else "it changes what a stack of layers reads, not the output of a layer"


def joined(case: Case) -> None:
    """Two active adapters with virtual tokens are one that has the tokens of both, in order of activation."""
    config: Any = case.config.replace(modules_to_save=None)
    if "num_transformer_submodules" in type(config).model_fields:
        config = config.replace(num_transformer_submodules=1)  # with 2, files hold vectors that nobody reads
    adapted = replace(case, config=config).adapted("a", "b")
    wide = config.portable().replace(num_virtual_tokens=2 * config.num_virtual_tokens)
    whole = replace(case, config=wide).untrained("both")
    for order in (("a", "b"), ("b", "a")):
        adapted.adapters.activate(order)
        halves = [adapted.adapters.parts(name) for name in order]
        for path, part in whole.adapters.parts("both").items():
            first, second = (half[path].saved() for half in halves)
            part.load_saved({key: torch.cat([first[key], second[key]]) for key in first})
        expect_close(adapted.logits(), whole.logits(), f"logits of {' and '.join(order)}")


def without_virtual_tokens(case: Case) -> str:
    """Why there is nothing to join, or nothing."""
    return "" if "num_virtual_tokens" in type(case.config).model_fields else "it has no virtual tokens"


def routed(case: Case) -> None:
    """Each row of a routed batch is what its adapter gives alone, with other types and the base beside it."""
    adapted = mixed(case)
    inputs = case.inputs(rows=len(ROWS))
    alone = row_by_row(adapted, lambda row: adapted.logits(_row(inputs, row)))
    with adapted.adapters.routed(ROWS):
        expect_close(adapted.logits(inputs), torch.cat(alone), "logits of a routed batch")
        with adapted.adapters.disabled():
            found = adapted.logits(inputs)
    with adapted.adapters.disabled():
        expect_equal(found, adapted.logits(inputs), "logits while disabled inside routed()")


def routed_training(case: Case) -> None:
    """Gradients of a routed batch are the sums over its rows; also with activation checkpointing."""
    adapted = mixed(case)
    inputs = case.inputs(rows=len(ROWS))
    adapted.adapters.train_only(["a", "b"])
    adapted.model.train()

    def backward(row: int) -> Tensor:
        total = _of_logits(adapted, _row(inputs, row))
        if total.requires_grad:
            total.backward()
        return total.detach()

    row_by_row(adapted, backward)
    wanted = gradients(_trained(adapted))
    for form in ("plain", "checkpointed"):
        if form == "checkpointed":
            checkpoint_activations(adapted.model, reentrant=False)
        adapted.model.zero_grad()
        with adapted.adapters.routed(ROWS):
            _of_logits(adapted, inputs).backward()
        found = gradients(_trained(adapted))
        for name, gradient in wanted.items():
            expect_close(
                found[name], gradient, f"the gradient of {name} in a routed batch ({form})", rtol=1e-3
            )


def routing_refused(case: Case) -> None:
    """Where the rows of a batch share what is adapted, routing them refuses in words, and nothing changes."""
    adapted = mixed(case)
    inputs, before, unchanged = case.inputs(rows=len(ROWS)), adapted.logits(), snapshot(adapted.model)

    def run() -> None:
        with adapted.adapters.routed(ROWS):
            adapted.logits(inputs)

    error = expect_refusal(run, AdapterError, "a routed batch")
    expect(bool(error.meaning), "the refusal to route gives no reason")
    unchanged()
    expect_equal(adapted.logits(), before, "logits after a refused route")


def mixed(case: Case) -> Adapted:
    """A model with the adapters a and b of the method, and one of another type."""
    adapted = case.adapted("a", "b")
    adapted.adapters.add("other", case.other)
    stir(adapted.adapters, "other", seed=5)
    return adapted


def row_by_row(adapted: Adapted, call: Callable[[int], Tensor]) -> list[Tensor]:
    """The result of `call` for every row number, with that row's adapter alone active."""
    found = []
    for number, name in enumerate(ROWS):
        with adapted.adapters.activated([] if name is None else name):
            found.append(call(number))
    return found


def _of_logits(adapted: Adapted, inputs: dict[str, Tensor]) -> Tensor:
    """A number whose gradients are sums over rows.

    The model's own loss is a mean over tokens, of which rows with virtual ones have one more: the last of
    those predicts the first real token.
    """
    total: Tensor = adapted.model(**inputs, use_cache=False).logits.logsumexp(-1).sum()
    return total


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: value[row : row + 1] for key, value in inputs.items()}


def _trained(adapted: Adapted) -> dict[str, nn.Parameter]:
    named = ((n, adapted.adapters.named_parameters(n)) for n in ("a", "b"))
    return {f"{n}: {key}": parameter for n, parameters in named for key, parameter in parameters.items()}


@torch.no_grad()
def _calls(adapted: Adapted) -> list[Call]:
    """What every adapted layer is called with when the base runs alone."""
    calls: list[Call] = []
    hooks = [
        site.register_forward_pre_hook(
            lambda site, args, kwargs: calls.append((site, args, kwargs)), with_kwargs=True
        )
        for site in adapted.model.modules()
        if isinstance(site, Site)
    ]
    with adapted.adapters.disabled():
        adapted.model(**adapted.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def _outputs(adapted: Adapted, names: tuple[str, ...], calls: list[Call]) -> list[Tensor]:
    with adapted.adapters.activated(names):
        leaves = [leaf for site, args, kwargs in calls for leaf in tree_leaves(site(*args, **kwargs))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
