"""Weighted sums of trained token rows: each row is the base's plus the mixed changes from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
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
    places,
    refuse_inside_copies,
    refuse_ranks,
    refuse_unknown,
    require_same_shapes,
    stored_dtype,
)
from graftlm.methods.tokens import Indices, TrainableTokensConfig

ROWS = "trainable_tokens_delta"

Asked = Indices | Mapping[str, Indices]
"""Token ids as configs give them: of the input embedding, or by name of table."""


def mixed_rows(
    terms: Sequence[Term], asked: Sequence[Asked | None], path: str, mixing: Mixing, base: BaseValue
) -> tuple[Indices, Tensor] | None:
    """The ids and rows of the table at `path`, or None if no term trains any of its rows.

    Args:
        asked: the ids of each term, as its config gives them.
    """
    some, rows = having(terms, path, ROWS)
    if not some:
        return None
    ids = [_ids_at(spec, path) for term, spec in zip(terms, asked, strict=True) if spec and term in some]
    all_ids = tuple(dict.fromkeys(number for own in ids for number in own))
    weights = [term.weight for term in some]
    require_same_shapes(some, path, [row[0] for row in rows])
    wide = [row.double() for row in rows]
    if (
        not mixing.is_sparse
        and abs(sum(weights) - 1) < 1e-12
        and all(set(own) == set(all_ids) for own in ids)
    ):
        means = [w * _placed(own, row, all_ids) for w, own, row in zip(weights, ids, wide, strict=True)]
        return all_ids, torch.stack(means).sum(0)
    origin = base(path, "weight")[torch.tensor(all_ids)].to(wide[0])
    where = {number: place for place, number in enumerate(all_ids)}
    changes = []
    for own, row in zip(ids, wide, strict=True):
        change = torch.zeros_like(origin)
        index = torch.tensor([where[number] for number in own])
        change[index] = row - origin[index]
        changes.append(change)
    return all_ids, origin + mixing.mix(weights, changes)


def ids_in_common(asked: Sequence[Asked | None], found: Mapping[str, Indices]) -> Asked | None:
    """How the config of the result gives the ids that were `found` by path."""
    if any(isinstance(spec, Mapping) for spec in asked):
        return dict(found)
    return next(iter(found.values()), None)


def combined_tokens(terms: Sequence[Term], mixing: Mixing, base: BaseValue) -> Combination:
    """The sum of adapters that train token rows and nothing else.

    Raises:
        AdapterError: their tables differ, or the base cannot be had.
    """
    refuse_ranks(mixing, "Token rows have no rank.")
    refuse_unknown(terms, {ROWS})
    refuse_inside_copies(terms)
    configs = [term.adapter.config for term in terms]
    asked = [config.token_indices for config in configs if isinstance(config, TrainableTokensConfig)]
    tables = [{path for path, part in term.parts.items() if ROWS in part} for term in terms]
    if any(table != tables[0] for table in tables):
        raise AdapterError(
            "The adapters train rows of different tables.",
            problems=[f"{term.name}: {', '.join(sorted(t))}" for term, t in zip(terms, tables, strict=True)],
            meaning="A file of this method names one list of tokens for all of its tables.",
            fix="Use trainable_token_indices of LoRA, which names tokens for each table.",
        )
    dtype = stored_dtype(terms)
    parts: dict[str, dict[str, Tensor]] = {}
    ids: Indices = ()
    for number, path in enumerate(sorted(places(terms))):
        parts[path] = mixed_copies(terms, path, mixing, base, number)
        if (mixed := mixed_rows(terms, asked, path, mixing, base)) is not None:
            ids, parts[path][ROWS] = mixed
        parts[path] = {name: tensor.to(dtype) for name, tensor in parts[path].items()}
    config = configs[0].replace(
        token_indices=ids,
        modules_to_save=tuple(path for path, part in parts.items() if is_copy(part)) or None,
        task_type=in_common(terms, "task_type", None),
    )
    return Combination(PlainAdapter(config, parts))


def _ids_at(asked: Asked, path: str) -> Indices:
    if not isinstance(asked, Mapping):
        return asked
    return next(
        ids
        for name, ids in asked.items()
        if path == name or path.endswith(f".{name}") or re.fullmatch(name, path)
    )


def _placed(ids: Indices, rows: Tensor, all_ids: Indices) -> Tensor:
    """The rows in the order of `all_ids`, which are the same ids."""
    where = {number: place for place, number in enumerate(ids)}
    return rows[torch.tensor([where[number] for number in all_ids])]
