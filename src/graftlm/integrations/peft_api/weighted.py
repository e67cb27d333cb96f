"""`add_weighted_adapter`: PEFT's words for Graft's combination of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError
from graftlm.integrations.peft_api.configs import BY_TYPE, PeftConfig
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import MethodConfig
from graftlm.methods.combining.combine import combine

WAYS: Mapping[str, str] = {
    "svd": "svd",
    "linear": "linear",
    "cat": "cat",
    "ties": "ties",
    "ties_svd": "ties",
    "dare_linear": "dare",
    "dare_linear_svd": "dare",
    "magnitude_prune": "magnitude",
    "magnitude_prune_svd": "magnitude",
}
"""PEFT's names of ways to combine. All act on the change of the weights here, not on its two factors."""
SPARSE = ("ties", "dare", "magnitude")


def add_weighted(
    adapters: AdapterSet,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    combination_type: str,
    options: Mapping[str, Any],
) -> PeftConfig:
    """Add the combination to `adapters`, inactive and frozen; returns its config in PEFT's words.

    Raises:
        ConfigError: an unknown way, or options that have no meaning for it; AdapterError: no such sum exists.
    """
    if combination_type not in WAYS:
        raise ConfigError(
            f"combination_type {combination_type!r} is not known{suggest(combination_type, list(WAYS))}.",
            fix=f"Choose one of {', '.join(WAYS)}.",
        )
    if len(names) != len(weights):
        raise ConfigError(
            f"{len(names)} adapters and {len(weights)} weights.", fix="Give one weight for each."
        )
    if options.get("svd_clamp") is not None:
        raise ConfigError(
            "svd_clamp is not supported.", meaning="It would change the sum.", fix="Leave it out."
        )
    total: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        total[name] = total.get(name, 0.0) + float(weight)
    way = WAYS[combination_type]
    asked: dict[str, Any] = {}
    if combination_type.endswith("svd"):
        asked["rank"] = options.get("svd_rank")
    if way in SPARSE:
        asked["density"] = options.get("density")
    if way == "ties":
        asked["majority_sign"] = options.get("majority_sign_method", "total")
    combine(adapters, total, new_name, how=way, **asked)
    return in_pefts_words(adapters.config(new_name))


def in_pefts_words(config: MethodConfig) -> PeftConfig:
    """A config of Graft's own as PEFT would say it."""
    kind = BY_TYPE[config.peft_type]
    fields = {key: value for key, value in config.model_dump().items() if key in kind.model_fields}
    return kind(**fields)
