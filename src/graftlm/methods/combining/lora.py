"""Weighted sums of LoRA adapters: exact in the change of each weight, whatever their ranks and scalings.

Scalings and weights go into B, so that the result's own scaling is 1. Biases and copied modules are summed as
changes from the base's values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftlm.core.errors import AdapterError, ConfigError
from graftlm.methods.combining.factors import Factors, Reduced, approximated, reduced, weighted_sum
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
    refuse_unknown,
    require_same_shapes,
    stored_dtype,
    with_biases_in_copies,
)
from graftlm.methods.combining.tokens import ROWS, Asked, ids_in_common, mixed_rows
from graftlm.methods.lora import LoraConfig
from graftlm.methods.tokens import Indices

LINEAR_B = "lora_B"
PAIRS = (("lora_A", LINEAR_B), ("lora_embedding_A", "lora_embedding_B"))
OUTPUT_BIAS = "lora_B_bias"
"""A bias beside B A, inside the scaling; without adapter it is zero."""
OWN_BIAS, OWN_BIAS_BESIDE = "bias", "shift.bias"
"""A trained copy of the base's bias, alone and beside a factored change."""
KNOWN = {*(name for names in PAIRS for name in names), OUTPUT_BIAS, OWN_BIAS, OWN_BIAS_BESIDE, ROWS}
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass
class _Sum:
    """The state of one combination while it is worked out."""

    terms: Sequence[Term]
    mixing: Mixing
    base: BaseValue
    dtype: torch.dtype
    largest_rank: int
    ranks: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, Reduced] = field(default_factory=dict)
    """Every factored change, also one that nothing was cut from."""
    ids: dict[str, Indices] = field(default_factory=dict)


def combined_lora(terms: Sequence[Term], mixing: Mixing, base: BaseValue) -> Combination:
    """The sum of LoRA adapters.

    Raises:
        AdapterError: a sum that no LoRA can express, with the reason; ConfigError: a rank out of range.
    """
    configs = [_config(term) for term in terms]
    terms = with_biases_in_copies(terms)
    _refuse_what_has_no_sum(terms, configs)
    shapes = _pair_shapes(terms)
    _require_rank_in_range(mixing, shapes)
    largest = max((rank for pairs in shapes.values() for rank, _ in pairs), default=0)
    work = _Sum(terms, mixing, base, stored_dtype(terms), largest)
    parts: dict[str, dict[str, Tensor]] = {}
    for number, path in enumerate(sorted(places(terms))):
        part = {**_pair(work, path, number), **_output_bias(work, path, number)}
        part |= _own_bias(work, path, number, is_beside=bool(part))
        part |= mixed_copies(terms, path, mixing, base, number)
        part |= _rows(work, path)
        parts[path] = {name: tensor.to(work.dtype).contiguous() for name, tensor in part.items()}
    if any(config.lora_bias for config in configs):
        _complete_output_biases(parts)
    total = sum(cut.total for cut in work.cuts.values())
    shares = {path: _share(cut.kept, cut.total) for path, cut in work.cuts.items()}
    lowest = min(shares, key=lambda path: shares[path], default="")
    return Combination(
        PlainAdapter(_sum_config(work, configs, parts), parts),
        kept=_share(sum(cut.kept for cut in work.cuts.values()), total),
        lowest_kept=shares.get(lowest, 1.0),
        lowest_at=lowest if shares.get(lowest, 1.0) < 1 else "",
    )


def _config(term: Term) -> LoraConfig:
    assert isinstance(term.adapter.config, LoraConfig)
    return term.adapter.config


def _scaling(term: Term, path: str) -> float:
    return _config(term).scaling_at(path)


def _share(kept: float, total: float) -> float:
    return min(1.0, kept / total) if total else 1.0


# What cannot be summed.


def _refuse_what_has_no_sum(terms: Sequence[Term], configs: Sequence[LoraConfig]) -> None:
    decomposed = [term.name for term, config in zip(terms, configs, strict=True) if config.use_dora]
    if decomposed:
        raise AdapterError(
            f"{', '.join(decomposed)}: a DoRA can be combined only alone, with weight 1.",
            meaning="It rescales the whole weight, so that the sum of two is no DoRA and no LoRA.",
            fix="Activate several adapters at once, which sums their outputs, or merge them.",
        )
    stacked = [term.name for term, config in zip(terms, configs, strict=True) if config.target_parameters]
    if stacked:
        raise AdapterError(
            f"{', '.join(stacked)}: updates of target_parameters can be combined only alone, with weight 1.",
            meaning="Their factors belong to stacks of experts, whose number only the model knows.",
            fix="Merge the adapters into the base one after the other instead.",
        )
    refuse_unknown(terms, KNOWN)
    refuse_inside_copies(terms)
    _refuse_half_trained_biases(terms, configs)


def _refuse_half_trained_biases(terms: Sequence[Term], configs: Sequence[LoraConfig]) -> None:
    """`bias="lora_only"` means the biases of all adapted layers, and some of them were not trained."""
    modes = {config.bias for config in configs}
    if modes != {"none", "lora_only"}:
        return
    trained = {
        path for term, c in zip(terms, configs, strict=True) if c.bias != "none" for path in term.parts
    }
    others = [path for path in places(terms) if path not in trained]
    if others:
        raise AdapterError(
            "Some of the adapters train the biases of their layers, others adapt further layers without.",
            problems=[f"no trained bias: {path}" for path in others[:10]],
            meaning="A file says once for all adapted layers whether it holds their biases.",
            fix="Combine adapters with the same setting of bias.",
        )


def _require_rank_in_range(mixing: Mixing, shapes: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    sums = [sum(rank for rank, _ in pairs) for pairs in shapes.values()]
    sides = [side for pairs in shapes.values() for _, side in pairs]
    most = max(sides if mixing.is_sparse else sums, default=0)
    if mixing.rank is not None and mixing.rank > most:
        what = "the smaller side of the largest layer" if mixing.is_sparse else "the sum of the ranks"
        raise ConfigError(
            f"rank={mixing.rank} is more than {what} ({most}).",
            meaning="A higher rank would hold zeros.",
            fix=f"Leave rank out, or give 1 to {most}.",
        )


def _pair_shapes(terms: Sequence[Term]) -> dict[str, list[tuple[int, int]]]:
    """The rank and the smaller side of each factored change, by path."""
    return {
        path: [
            (term.parts[path][a].shape[0], min(term.parts[path][a].shape[1], term.parts[path][b].shape[0]))
            for a, b in PAIRS
            for term in terms
            if a in term.parts.get(path, {})
        ]
        for path in places(terms)
    }


# One place.


def _factors(work: _Sum, path: str) -> list[tuple[Term, Factors]]:
    """The changes of the terms at `path`, in float64, with their own scaling in b."""
    found = []
    for first, second in PAIRS:
        for term, a in zip(*having(work.terms, path, first), strict=True):
            b = term.parts[path][second]
            scaling = _scaling(term, path)
            found.append((term, Factors(a.double(), scaling * b.double())))
    return found


def _pair(work: _Sum, path: str, number: int) -> dict[str, Tensor]:
    found = _factors(work, path)
    if not found:
        return {}
    terms, pairs = [term for term, _ in found], [pair for _, pair in found]
    require_same_shapes(terms, path, [torch.empty(pair.sides, device="meta") for pair in pairs])
    factors = _cut(work, path, number, [term.weight for term in terms], pairs)
    work.ranks[path] = factors.rank
    first, second = next(names for names in PAIRS if names[0] in terms[0].parts[path])
    return {first: factors.a, second: factors.b}


def _cut(work: _Sum, path: str, number: int, weights: Sequence[float], pairs: Sequence[Factors]) -> Factors:
    mixing = work.mixing
    if mixing.is_sparse:
        changes = [pair.dense().to(work.dtype) for pair in pairs]
        most = mixing.rank or sum(pair.rank for pair in pairs)
        work.cuts[path] = approximated(mixing.mix(weights, changes, number), min(most, *pairs[0].sides))
        return work.cuts[path].factors
    whole = weighted_sum(weights, pairs)
    most = mixing.rank or (work.largest_rank if mixing.how == "svd" else whole.rank)
    if whole.rank <= most:
        work.cuts[path] = Reduced(whole, whole.square(), whole.square())
    else:
        work.cuts[path] = reduced(whole, most)
    return work.cuts[path].factors


def _output_bias(work: _Sum, path: str, number: int) -> dict[str, Tensor]:
    terms, biases = having(work.terms, path, OUTPUT_BIAS)
    if not terms:
        return {}
    changes = [_scaling(t, path) * bias.double() for t, bias in zip(terms, biases, strict=True)]
    return {OUTPUT_BIAS: work.mixing.mix([term.weight for term in terms], changes, number)}


def _complete_output_biases(parts: Mapping[str, dict[str, Tensor]]) -> None:
    """`lora_bias` holds for every adapted linear layer; a term without it adds nothing."""
    for part in parts.values():
        if LINEAR_B in part and OUTPUT_BIAS not in part:
            part[OUTPUT_BIAS] = torch.zeros_like(part[LINEAR_B][:, 0])


def _own_bias(work: _Sum, path: str, number: int, *, is_beside: bool) -> dict[str, Tensor]:
    terms, values = having(work.terms, path, OWN_BIAS, OWN_BIAS_BESIDE)
    if not terms:
        return {}
    mixed = mixed_values(terms, values, (path, "bias"), work.mixing, work.base, number)
    return {OWN_BIAS_BESIDE if is_beside else OWN_BIAS: mixed}


def _rows(work: _Sum, path: str) -> dict[str, Tensor]:
    mixed = mixed_rows(work.terms, _asked(work.terms), path, work.mixing, work.base)
    if mixed is None:
        return {}
    work.ids[path], rows = mixed
    return {ROWS: rows}


def _asked(terms: Sequence[Term]) -> list[Asked | None]:
    return [_config(term).trainable_token_indices for term in terms]


# The config of the result.


def _sum_config(
    work: _Sum, configs: Sequence[LoraConfig], parts: Mapping[str, Mapping[str, Tensor]]
) -> LoraConfig:
    """Scaling 1 everywhere; the rank that most layers have, and a pattern for the others."""
    rank = Counter(work.ranks.values()).most_common(1)[0][0] if work.ranks else configs[0].r
    others = {path: own for path, own in work.ranks.items() if own != rank}
    copied = tuple(path for path, part in parts.items() if is_copy(part))
    changes = {
        **_selection(work, configs),
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": copied or None,
        "trainable_token_indices": ids_in_common(_asked(work.terms), work.ids),
        "bias": max((config.bias for config in configs), key=("none", "lora_only", "all").index),
        "lora_bias": any(config.lora_bias for config in configs),
        "lora_dropout": in_common(work.terms, "lora_dropout", 0.0),
        "task_type": in_common(work.terms, "task_type", None),
    }
    return configs[0].replace(**changes)


def _selection(work: _Sum, configs: Sequence[LoraConfig]) -> dict[str, object]:
    """As the terms spell it where all say the same, else the paths themselves."""
    fields = [{name: getattr(config, name) for name in SELECTION} for config in configs]
    paths = [
        {path for path, part in term.parts.items() if any(first in part for first, _ in PAIRS)}
        for term in work.terms
    ]
    if all(field == fields[0] for field in fields) and all(path == paths[0] for path in paths):
        return fields[0]
    return {**dict.fromkeys(SELECTION), "target_modules": tuple(sorted(work.ranks))}
