"""Weighted combination of adapters: one new adapter whose change is the weighted sum of theirs.

What cannot be combined exactly, or by a way that says what it loses, is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from graftlm.core.errors import AdapterError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import MethodConfig
from graftlm.methods.combining.lora import combined_lora
from graftlm.methods.combining.mixing import Mixing
from graftlm.methods.combining.terms import BaseValue, Combination, PlainAdapter, Term
from graftlm.methods.combining.tokens import combined_tokens
from graftlm.methods.combining.values import combined_full, combined_ia3
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.site import Site
from graftlm.methods.tokens import TrainableTokensConfig

Combiner = Callable[[Sequence[Term], Mixing, BaseValue], Combination]

COMBINERS: Mapping[type[MethodConfig], Combiner] = {
    LoraConfig: combined_lora,
    IA3Config: combined_ia3,
    FullConfig: combined_full,
    TrainableTokensConfig: combined_tokens,
}
"""How a method is summed. A method that is not listed has no sum: its adapters can only be taken alone."""


def combine(
    adapters: AdapterSet, weights: Mapping[str, float], name: str, *, how: str = "linear", **options: Any
) -> Combination:
    """Add the weighted combination of some adapters of a model as a new one, inactive and frozen.

    Args:
        adapters: the model's adapters; those that are combined stay as they are.
        weights: adapter name to weight; negative weights subtract, zero leaves out.
        name: of the new adapter.
        how: `linear` or `cat` (exact), `svd`, `ties`, `dare`, `magnitude`; see `Mixing`, also for `options`.

    Raises:
        AdapterError: the name is taken, or the combination has no meaning; ConfigError: wrong options.

    >>> import graftlm as gl
    >>> model, _ = gl.load_model("sprout")
    >>> adapters = gl.attach(model, gl.LoraConfig(r=4), "a")
    >>> adapters.add("b", gl.LoraConfig(r=2))
    >>> combine(adapters, {"a": 0.7, "b": -0.3}, "c").kept
    1.0
    >>> adapters.config("c").r, adapters.active
    (6, ('a',))
    """
    mixing = Mixing(how=how, **options)
    if name in adapters:
        raise AdapterError(
            f"An adapter named {name!r} exists already.", fix="Choose another name, or delete it first."
        )
    terms = [Term(key, weight, _plain(adapters, key)) for key, weight in weights.items()]
    found = combined(terms, mixing, base_values(adapters))
    kinds = {tensor.dtype for part in found.adapter.parts.values() for tensor in part.values()}
    adapters.add(name, found.adapter.config, dtype="float32" if torch.float32 in kinds else "base")
    with ExitStack() as undo:
        undo.callback(adapters.delete, name)
        for path, part in adapters.parts(name).items():
            part.load_saved(found.adapter.parts[path])
        undo.pop_all()
    return found


def combined(terms: Sequence[Term], mixing: Mixing, base: BaseValue) -> Combination:
    """The weighted combination as plain tensors. One adapter with weight 1 comes out as it is.

    Raises:
        AdapterError: the combination has no meaning, with the reason; ConfigError: wrong options.
    """
    _require_weights(terms)
    terms = [term for term in terms if term.weight != 0] or list(terms)
    if is_copy_of_one(terms, mixing):
        return Combination(terms[0].adapter)
    kinds = {type(term.adapter.config) for term in terms}
    if len(kinds) > 1:
        raise AdapterError(
            "The adapters are of different methods.",
            problems=[f"{term.name}: {term.adapter.config.peft_type}" for term in terms],
            meaning="A weighted sum stays within one method, or no file could hold it.",
            fix="Activate them together, or merge one into the base and combine the others.",
        )
    combiner = next((found for kind, found in COMBINERS.items() if kinds == {kind}), None)
    if combiner is None:
        method = terms[0].adapter.config.peft_type
        raise AdapterError(
            f"Adapters of the method {method} can be combined only alone, with weight 1.",
            meaning="What they do is not linear in their parameters: a sum of those is no sum of effects.",
            fix="Activate several adapters at once, which sums their effects.",
        )
    return combiner(terms, mixing, base)


def is_copy_of_one(terms: Sequence[Term], mixing: Mixing) -> bool:
    """Whether the combination is one of the adapters itself: the only one left, whole, with weight 1."""
    is_whole = mixing.rank is None and (not mixing.is_sparse or mixing.density == 1)
    return len(terms) == 1 and terms[0].weight == 1 and is_whole


def base_values(adapters: AdapterSet) -> BaseValue:
    """The base's own parameters, whatever is merged into it."""

    def value(path: str, parameter: str) -> Tensor:
        module = adapters.model.get_submodule(path)
        if not isinstance(module, Site):
            return module.get_parameter(parameter).detach()
        original = module.originals.get(parameter)
        found = module.base_layer.get_parameter(parameter) if original is None else original
        return found.detach()

    return value


def _plain(adapters: AdapterSet, name: str) -> PlainAdapter:
    parts = {path: dict(part.saved()) for path, part in adapters.parts(name).items()}
    config = adapters.config(name).portable()
    if isinstance(config, LoraConfig):
        config = config.replace(init_lora_weights=True)  # how it began is no property of its sum
    return PlainAdapter(config, parts)


def _require_weights(terms: Sequence[Term]) -> None:
    if not terms:
        raise AdapterError("No adapters were given to combine.", fix="Name at least one, with a weight.")
    bad = [f"{term.name}: {term.weight!r}" for term in terms if not math.isfinite(term.weight)]
    if bad:
        raise AdapterError("Some weights are no numbers.", problems=bad, fix="Give finite weights.")
