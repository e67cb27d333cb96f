"""What is combined and what comes out: adapters as plain tensors, without a model around them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftlm.core.errors import AdapterError, ConfigError
from graftlm.methods.base import MethodConfig
from graftlm.methods.combining.mixing import Mixing

BaseValue = Callable[[str, str], Tensor]
"""(module path, parameter name) -> the base's own value there.

Raises:
    AdapterError: the base cannot be had.
"""

COPY = "module."
"""How names of `modules_to_save` begin in `Part.saved`: the whole module, parameter by parameter."""


@dataclass(frozen=True)
class PlainAdapter:
    """A config, and what a file holds: tensors by module path and by name in `Part.saved`."""

    config: MethodConfig
    parts: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Term:
    """One adapter of a sum."""

    name: str
    weight: float
    adapter: PlainAdapter

    @property
    def parts(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self.adapter.parts


@dataclass(frozen=True)
class Combination:
    """The adapter that came out, and what a cut of its rank cost."""

    adapter: PlainAdapter
    kept: float = 1.0
    """Fraction of the squared norm of the weighted change that the result holds; 1 if it is exact."""
    lowest_kept: float = 1.0
    """The same of the one place where it is lowest."""
    lowest_at: str = ""
    """The path of that place, or nothing if all are exact."""


def having(terms: Sequence[Term], path: str, *names: str) -> tuple[list[Term], list[Tensor]]:
    """The terms that hold a tensor of one of these names at `path`, and their tensors."""
    found = [
        (term, part[name])
        for term in terms
        for part in (term.parts.get(path, {}),)
        for name in names
        if name in part
    ]
    return [term for term, _ in found], [tensor for _, tensor in found]


def is_copy(part: Mapping[str, Tensor]) -> bool:
    """Whether these tensors are a module of `modules_to_save`."""
    return any(name.startswith(COPY) for name in part)


def places(terms: Sequence[Term]) -> list[str]:
    """Every module path of the terms, in order of appearance."""
    return list(dict.fromkeys(path for term in terms for path in term.parts))


def stored_dtype(terms: Sequence[Term]) -> torch.dtype:
    """float32, or float64 where a term has it: products and sums of 16-bit numbers need more than 16 bits."""
    tensors = [tensor for term in terms for part in term.parts.values() for tensor in part.values()]
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def require_same_shapes(terms: Sequence[Term], where: str, tensors: Sequence[Tensor]) -> None:
    """Refuse terms that were made for layers of different sizes.

    Raises:
        AdapterError: they were.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        listed = [f"{term.name}: {list(shape)}" for term, shape in zip(terms, shapes, strict=True)]
        raise AdapterError(
            f"The adapters do not have the same shapes at {where}.",
            problems=listed,
            meaning="They were trained on different bases.",
            fix="Combine adapters of one base.",
        )


def mixed_values(
    terms: Sequence[Term], values: Sequence[Tensor], where: tuple[str, str], mixing: Mixing,
    base: BaseValue, number: int,
) -> Tensor:  # fmt: skip
    """The base's value plus the mixed changes from it, of one parameter that the terms replace.

    Terms that leave the parameter alone are not given. Plain sums with weights that add up to 1 are weighted
    means of the values themselves, and need no base.
    """
    path, parameter = where
    require_same_shapes(terms, f"{path}.{parameter}", values)
    weights = [term.weight for term in terms]
    wide = [value.double() for value in values]
    if not mixing.is_sparse and abs(sum(weights) - 1) < 1e-12:
        return sum((w * value for w, value in zip(weights, wide, strict=True)), torch.zeros(()).double())
    origin = base(path, parameter).to(wide[0])
    require_same_shapes([terms[0], terms[0]], f"{path}.{parameter} of the base", [values[0], origin])
    return origin + mixing.mix(weights, [value - origin for value in wide], number)


def mixed_copies(
    terms: Sequence[Term], path: str, mixing: Mixing, base: BaseValue, number: int
) -> dict[str, Tensor]:
    """The copy of the module at `path` (`modules_to_save`), from those of the terms that have one."""
    names = dict.fromkeys(n for term in terms for n in term.parts.get(path, {}) if n.startswith(COPY))
    found = {}
    for name in names:
        some, values = having(terms, path, name)
        where = (path, name.removeprefix(COPY))
        found[name] = mixed_values(some, values, where, mixing, base, number)
    return found


def with_biases_in_copies(terms: Sequence[Term]) -> list[Term]:
    """The terms with lone trained biases as parts of the copies that other terms have of their modules."""
    copied = {path for term in terms for path, part in term.parts.items() if is_copy(part)}
    found = []
    for term in terms:
        parts: dict[str, dict[str, Tensor]] = {}
        for path, part in term.parts.items():
            outer = next((o for o in copied if path == o or path.startswith(f"{o}.")), None)
            if outer is not None and part.keys() == {"bias"}:
                inner = f"{path}.bias".removeprefix(f"{outer}.")
                parts.setdefault(outer, {})[COPY + inner] = part["bias"]
            else:
                parts.setdefault(path, {}).update(part)
        found.append(replace(term, adapter=replace(term.adapter, parts=parts)))
    return found


def refuse_unknown(terms: Sequence[Term], known: Collection[str]) -> None:
    """Refuse tensors of which nobody here knows what a sum of them means.

    Raises:
        AdapterError: there are some.
    """
    problems = [
        f"{term.name}: {path}.{name}"
        for term in terms
        for path, part in term.parts.items()
        for name in part
        if name not in known and not name.startswith(COPY)
    ]
    if problems:
        raise AdapterError(
            "The adapters hold tensors that have no sum.",
            problems=problems[:10],
            meaning="A variant of the method, or another tool, put them there.",
            fix="Merge the adapters into the base one after the other instead.",
        )


def refuse_inside_copies(terms: Sequence[Term]) -> None:
    """Refuse a change inside a module that another term replaces whole.

    Raises:
        AdapterError: there is one.
    """
    copied = {path: term.name for term in terms for path, part in term.parts.items() if is_copy(part)}
    problems = [
        f"{term.name} adapts {path}, {name} has a copy of {outer}"
        for term in terms
        for path, part in term.parts.items()
        for outer, name in copied.items()
        if path.startswith(f"{outer}.") or (path == outer and not is_copy(part))
    ]
    if problems:
        raise AdapterError(
            "One adapter copies a module that another adapts.",
            problems=problems[:10],
            meaning="One file cannot hold both: a copy (modules_to_save) and a change inside it.",
            fix="Merge one of them into the base first.",
        )


def in_common(terms: Sequence[Term], name: str, otherwise: object) -> object:
    """The value of a config field that all terms share, or `otherwise`."""
    values = [getattr(term.adapter.config, name) for term in terms]
    return values[0] if all(value == values[0] for value in values) else otherwise


def refuse_ranks(mixing: Mixing, reason: str) -> None:
    """Refuse a request for a rank where there is none.

    Raises:
        ConfigError: it is one.
    """
    if mixing.rank is not None or mixing.how == "svd":
        raise ConfigError(
            f"{'rank' if mixing.rank is not None else 'svd'} has no meaning for these adapters.",
            meaning=reason,
            fix="Leave it out.",
        )
