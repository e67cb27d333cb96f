"""`adapter_config.json`, both directions: what PEFT's fields mean for our configs, and the reverse."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.config import build
from graftlm.core.errors import ConfigError, FormatError
from graftlm.formats.peft_keys import copied_paths, target_path
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import MethodConfig
from graftlm.methods.families import ROLES
from graftlm.methods.layer_config import LayerConfig
from graftlm.methods.site import base_modules
from graftlm.methods.table import method
from graftlm.methods.targets import named, select

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"LORA": {"r": 8, "lora_alpha": 8}}
"""What PEFT means where a file leaves a field out, as far as it differs from our defaults."""

INERT = frozenset(
    (
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "peft_version",
            "peft_type",
        ),
        *("runtime_config", "fan_in_fan_out", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    )
)
"""Fields that say nothing about what the tensors of a finished adapter mean."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "use_bdlora"), (False, None)),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), ({}, None)),
    **dict.fromkeys(("target_parameters", "trainable_token_indices"), (None, [], {})),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens", "arrow_config"), (None, {})),
    **dict.fromkeys(("velora_config", "monteclora_config", "kasa_config", "megatron_config"), (None, {})),
}
"""Fields that change the meaning in ways this version does not have, and the values at which they do not."""

EDITS_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that subtract something from the base: such a file belongs to an edited base."""


HISTORY = {"init_lora_weights": True}
"""How an adapter began; its tensors are there, and a loader must not begin again."""


def to_json(adapters: AdapterSet, name: str, base_name: str) -> dict[str, Any]:
    """The content of `adapter_config.json`, sorted lists only."""
    config = adapters.config(name).portable()
    modules = base_modules(adapters.model)
    fields = config.model_dump(mode="json")
    fields |= {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": _copied(adapters.model, config),
        "peft_type": config.peft_type,
        "revision": None,
    }
    fields |= {key: value for key, value in HISTORY.items() if key in fields}
    if isinstance(config, LayerConfig) and _uses_roles(config):
        fields |= {"target_modules": _expanded(adapters.model, config), "exclude_modules": None}
        fields |= {"layers_to_transform": None, "layers_pattern": None}
    if "fan_in_fan_out" not in fields and config.peft_type in DEFAULTS:
        fields["fan_in_fan_out"] = any(isinstance(modules[path], Conv1D) for path in adapters.parts(name))
    return fields


def _copied(model: nn.Module, config: MethodConfig) -> list[str] | None:
    """Full paths: PEFT takes a name for the ending of any path, without a dot before it."""
    return named(model, config.modules_to_save or (), "modules_to_save") or None


def _uses_roles(config: LayerConfig) -> bool:
    specs = (config.target_modules, config.exclude_modules or ())
    return any(name in ROLES for spec in specs for name in ((spec,) if isinstance(spec, str) else spec))


def _expanded(model: nn.Module, config: LayerConfig) -> list[str]:
    """Roles as module names that any PEFT understands: bare names where those select the same modules."""
    chosen = select(model, config)
    leaves = sorted({path.rpartition(".")[2] for path in chosen})
    plain = config.replace(
        target_modules=tuple(leaves), exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )
    return leaves if select(model, plain) == chosen else sorted(chosen)


def from_json(content: Mapping[str, Any], keys: Iterable[str], source: str) -> MethodConfig:
    """Our config for a file's fields. Unknown fields warn; fields with a meaning we do not have are refused.

    Raises:
        FormatError: the file needs something that this version cannot do; every such field is named.
    """
    peft_type = content.get("peft_type")
    if not isinstance(peft_type, str):
        raise FormatError(f"{source} has no peft_type.", meaning="It is not the config of an adapter.")
    try:
        kind = method(peft_type)
        fields = {**DEFAULTS.get(peft_type, {}), **content}
        _refuse_foreign_meaning(fields, kind, source)
        keys = list(keys)
        known = {key: value for key, value in fields.items() if key in kind.model_fields and value != []}
        if issubclass(kind, LayerConfig) and not known.get("target_modules"):
            known["target_modules"] = sorted({path for key in keys if (path := target_path(key))})
        if known.get("modules_to_save"):
            known["modules_to_save"] = copied_paths(known["modules_to_save"], keys)
        known |= {key: value for key, value in HISTORY.items() if key in kind.model_fields}
        return build(kind, known, source=source)
    except ConfigError as error:
        raise FormatError(
            error.seen, problems=error.problems, meaning="The adapter's config cannot be used.", fix=error.fix
        ) from None


def _refuse_foreign_meaning(fields: Mapping[str, Any], kind: type[MethodConfig], source: str) -> None:
    refused = [
        f"{key}: {fields[key]!r} is not supported"
        for key, neutral in NEUTRAL.items()
        if key in fields and key not in kind.model_fields and fields[key] not in neutral
    ]
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(EDITS_BASE):
        refused.append(
            f"init_lora_weights: {init!r} edits the base; convert the adapter to a plain LoRA first"
        )
    if refused:
        raise FormatError(
            f"{source} needs what this version does not have.",
            problems=refused,
            meaning="Loading it anyway would give other outputs than it was trained for.",
            fix="Export the adapter as a plain LoRA with the tool that made it.",
        )
    unknown = sorted(set(fields) - set(kind.model_fields) - INERT - set(NEUTRAL))
    if unknown:
        warnings.warn(f"{source}: unknown fields are ignored: {', '.join(unknown)}", stacklevel=4)
