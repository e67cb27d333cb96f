"""Weighted sums of adapters that put values in the place of others: (IA)^3, and tuned parameters of the base.

The sum is that of the changes: from 1 for a factor of (IA)^3, from the base's value for a parameter of it.
With weights that add up to 1 that is the weighted mean of the values.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graftlm.core.errors import AdapterError
from graftlm.methods.combining.mixing import Mixing
from graftlm.methods.combining.terms import (
    BaseValue,
    Combination,
    PlainAdapter,
    Term,
    having,
    in_common,
    is_copy,
    mixed_copies,
    mixed_values,
    places,
    refuse_inside_copies,
    refuse_ranks,
    refuse_unknown,
    require_same_shapes,
    stored_dtype,
)
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config

FACTORS = "ia3_l"
SELECTION = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "feedforward_modules",
)


def combined_ia3(terms: Sequence[Term], mixing: Mixing, base: BaseValue) -> Combination:
    """The sum of (IA)^3 adapters: `1 + sum of weight * (factors - 1)`, exact in the change of each weight.

    Raises:
        AdapterError: a sum that has no meaning, with the reason.
    """
    refuse_ranks(mixing, "(IA)^3 has factors, no rank.")
    refuse_unknown(terms, {FACTORS})
    refuse_inside_copies(terms)
    dtype = stored_dtype(terms)
    parts: dict[str, dict[str, Tensor]] = {}
    for number, path in enumerate(sorted(places(terms))):
        some, factors = having(terms, path, FACTORS)
        parts[path] = mixed_copies(terms, path, mixing, base, number)
        if some:
            require_same_shapes(some, path, factors)
            changes = [value.double() - 1 for value in factors]
            parts[path][FACTORS] = 1 + mixing.mix([term.weight for term in some], changes, number)
        parts[path] = {name: tensor.to(dtype) for name, tensor in parts[path].items()}
    return Combination(PlainAdapter(_ia3_config(terms, parts), parts))


def _ia3_config(terms: Sequence[Term], parts: dict[str, dict[str, Tensor]]) -> IA3Config:
    first = terms[0].adapter.config
    assert isinstance(first, IA3Config)
    copied = tuple(path for path, part in parts.items() if is_copy(part)) or None
    changes = {"modules_to_save": copied, "task_type": in_common(terms, "task_type", None)}
    adapted = [{path for path, part in term.parts.items() if FACTORS in part} for term in terms]
    is_same = all(paths == adapted[0] for paths in adapted)
    if is_same and all(in_common(terms, name, terms) is not terms for name in SELECTION):
        return first.replace(**changes)
    chosen = {path: part[FACTORS] for path, part in parts.items() if FACTORS in part}
    inner = tuple(path for path, factors in chosen.items() if factors.shape[0] == 1 != factors.shape[1])
    everywhere = dict.fromkeys(SELECTION[1:4])
    return first.replace(**changes, **everywhere, target_modules=tuple(chosen), feedforward_modules=inner)


def combined_full(terms: Sequence[Term], mixing: Mixing, base: BaseValue) -> Combination:
    """The sum of changes of the base's own parameters (task arithmetic, arXiv 2212.04089).

    Raises:
        AdapterError: the adapters tune different kinds of parameters, or the base cannot be had.
    """
    refuse_ranks(mixing, "Tuned parameters of the base have no rank.")
    refuse_unknown(terms, {"bias"})
    config = terms[0].adapter.config
    assert isinstance(config, FullConfig)
    if any(term.adapter.config != config for term in terms):
        raise AdapterError(
            "The adapters tune different parameters of the base.",
            problems=[f"{term.name}: {term.adapter.config!r}" for term in terms],
            meaning="One file says once which of the base's parameters it holds.",
            fix="Combine adapters that were trained with the same settings.",
        )
    dtype = stored_dtype(terms)
    parts: dict[str, dict[str, Tensor]] = {}
    for number, path in enumerate(sorted(places(terms))):
        parts[path] = mixed_copies(terms, path, mixing, base, number)
        some, biases = having(terms, path, "bias")
        if some:
            parts[path]["bias"] = mixed_values(some, biases, (path, "bias"), mixing, base, number)
        parts[path] = {name: tensor.to(dtype) for name, tensor in parts[path].items()}
    return Combination(PlainAdapter(config, parts))
