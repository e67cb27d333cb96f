"""What is searched where nobody names a space: what the field's studies found to matter most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftlm.training.defaults import HIGHEST_RATE
from graftlm.training.method_section import TYPES

_RATES = {"low": 1e-4, "high": HIGHEST_RATE, "log": True}
_LOW_RANK = {"method.r": [4, 8, 16, 32], "method.target_modules": ["attention", "all-linear"]}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "LORA": _LOW_RANK,
    "BOTTLENECK": {"method.reduction_factor": [8, 16, 32]},
    "PREFIX_TUNING": {"method.num_virtual_tokens": [5, 10, 20, 40]},
    "PROMPT_TUNING": {"method.num_virtual_tokens": [10, 20, 40, 80]},
}


def default_space(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rate before all else, then the size of the method; fields that the user wrote stay.

    Rates first: variants of LoRA end close together once each has its own rate (research: "Learning Rate
    Matters", 2026; "LoRA Without Regret", 2025, also for all linear layers rather than attention alone).

    >>> sorted(default_space({"method": {"type": "lora", "r": 8}}))
    ['method.target_modules', 'train.learning_rate']
    """
    method = sections.get("method", {})
    kind = TYPES.get(str(method.get("type", "lora")))
    own = _OWN.get(kind.peft_type, {}) if kind is not None else {}
    found = {"train.learning_rate": _RATES, **own}
    return {
        name: domain
        for name, domain in found.items()
        if name.partition(".")[2] not in sections.get(name.partition(".")[0], {})
    }
