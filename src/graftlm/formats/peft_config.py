"""`adapter_config.json`, both directions: what PEFT's fields mean for our configs, and the reverse."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.config import build
from graftlm.core.errors import ConfigError, FormatError
from graftlm.formats.peft_keys import copied_paths, target_path
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import MethodConfig
from graftlm.methods.experts import ParameterLora
from graftlm.methods.families import ROLES
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.layer_config import LayerConfig
from graftlm.methods.patterns import matches, order_free
from graftlm.methods.site import base_modules
from graftlm.methods.table import method
from graftlm.methods.targets import named, select
from graftlm.methods.virtual.config import VirtualTokensConfig

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"LORA": {"r": 8, "lora_alpha": 8}, "IA3": {}}
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
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "init_weights"),
    )
)
"""Fields that say nothing about what the tensors of a finished adapter mean."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_qalora", "use_bdlora"), (False, None)),
    **dict.fromkeys(("target_parameters", "trainable_token_indices"), (None, [], {})),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens", "arrow_config"), (None, {})),
    **dict.fromkeys(("velora_config", "monteclora_config", "kasa_config", "megatron_config"), (None, {})),
}
"""Fields that change the meaning in ways this version does not have, and the values at which they do not."""

OURS_ALONE: Mapping[str, tuple[str, ...]] = {
    "IA3": ("layers_to_transform", "layers_pattern"),
    "TRAINABLE_TOKENS": ("modules_to_save",),
    "ADAPTION_PROMPT": ("modules_to_save",),
    "PREFIX_TUNING": ("init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
}
"""Fields that PEFT's config of that type lacks: what they say is written as names of modules."""

EMPTY_MEANS_NONE = ("feedforward_modules",)
"""Lists that say something when they are empty; elsewhere old versions wrote an empty list for null."""

EDITS_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that subtract something from the base: such a file belongs to an edited base."""


PATTERNS = ("rank_pattern", "alpha_pattern")
"""Fields whose order decides. A file keeps none, so what is written does not depend on it."""

FIRST_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""Where PEFT finds the number of a layer unless `layers_pattern` says."""

HISTORY = {
    "init_lora_weights": True,
    "eva_config": None,
    "loftq_config": None,
    "init_weights": None,
    "prompt_tuning_init": "RANDOM",
    "prefix_projection": False,
    **dict.fromkeys(("prompt_tuning_init_text", "init_text", "tokenizer_name_or_path", "tokenizer_kwargs")),
}
"""How an adapter began; its tensors are there, and a loader must not begin again."""


def to_json(adapters: AdapterSet, name: str, base_name: str) -> dict[str, Any]:
    """The content of `adapter_config.json`, sorted lists only."""
    config = adapters.config(name).portable()
    modules, paths = base_modules(adapters.model), list(adapters.parts(name))
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
    alone = OURS_ALONE.get(config.peft_type, ())
    has_alone = any(fields[key] is not None for key in alone)
    if isinstance(config, LayerConfig) and (has_alone or _needs_names(config, paths)):
        fields |= {"target_modules": _expanded(adapters.model, config), "exclude_modules": None}
        fields |= {"layers_to_transform": None, "layers_pattern": None}
    if isinstance(config, VirtualTokensConfig):
        fields |= config.described(adapters.model)
    if isinstance(config, IA3Config):
        fields |= _feed_forwards(adapters.model, config, fields["target_modules"])
    fields = {key: value for key, value in fields.items() if key not in alone}
    valued = _paths_with_ranks(adapters, name)
    fields |= {key: order_free(fields[key], valued) for key in PATTERNS if key in fields}
    if "fan_in_fan_out" not in fields and config.peft_type in DEFAULTS:
        fields["fan_in_fan_out"] = any(isinstance(modules[path], Conv1D) for path in adapters.parts(name))
    return fields


def _paths_with_ranks(adapters: AdapterSet, name: str) -> list[str]:
    """What patterns are compared with: adapted modules, and parameters that are adapted by themselves."""
    found: list[str] = []
    for path, part in adapters.parts(name).items():
        found += [f"{path}.{key}" for key in part.factors] if isinstance(part, ParameterLora) else [path]
    return found


def _copied(model: nn.Module, config: MethodConfig) -> list[str] | None:
    """Full paths: PEFT takes a name for the ending of any path, without a dot before it."""
    return named(model, config.modules_to_save or (), "modules_to_save") or None


def _needs_names(config: LayerConfig, paths: Sequence[str]) -> bool:
    """Whether PEFT would choose other modules by the same fields."""
    return _uses_roles(config) or _counts_layers(config, paths)


def _uses_roles(config: LayerConfig) -> bool:
    specs = (config.target_modules, config.exclude_modules or ())
    return any(name in ROLES for spec in specs for name in ((spec,) if isinstance(spec, str) else spec))


def _counts_layers(config: LayerConfig, paths: Sequence[str]) -> bool:
    """Whether PEFT would refuse `layers_to_transform`, or find other numbers in the paths."""
    if config.layers_to_transform is None:
        return False
    wanted = config.layers_to_transform
    layers = (wanted,) if isinstance(wanted, int) else wanted
    found = [match and int(match[1]) in layers for path in paths for match in [FIRST_INDEX.match(path)]]
    return isinstance(config.target_modules, str) or (config.layers_pattern is None and not all(found))


def _expanded(model: nn.Module, config: LayerConfig) -> list[str]:
    """Roles as module names that any PEFT understands: bare names where those select the same modules."""
    chosen = select(model, config)
    leaves = sorted({path.rpartition(".")[2] for path in chosen})
    plain = config.replace(
        target_modules=tuple(leaves), exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )
    return leaves if select(model, plain) == chosen else sorted(chosen)


def _feed_forwards(model: nn.Module, config: IA3Config, entries: str | list[str]) -> dict[str, list[str]]:
    """PEFT wants each of `feedforward_modules` to be an entry of `target_modules` where that is a list."""
    chosen = select(model, config)
    inner = config.feed_forwards(model, chosen)
    if isinstance(entries, str):
        return {"feedforward_modules": sorted(inner)}
    hits = {entry: [path for path in chosen if path.endswith(entry)] for entry in entries}
    own = [entry for entry, paths in hits.items() if paths and set(paths) <= set(inner)]
    if set(inner) <= {path for entry in own for path in hits[entry]}:
        return {"feedforward_modules": own}
    return {"feedforward_modules": sorted(inner), "target_modules": sorted(chosen)}


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
        said = {key: value for key, value in fields.items() if value != [] or key in EMPTY_MEANS_NONE}
        known = {key: value for key, value in said.items() if key in kind.model_fields}
        if known.get("target_parameters"):
            known.setdefault("target_modules", ())
        elif issubclass(kind, LayerConfig) and not known.get("target_modules"):
            known["target_modules"] = sorted({path for key in keys if (path := target_path(key))})
        known |= _matching_patterns(known, keys)
        if known.get("modules_to_save"):
            known["modules_to_save"] = copied_paths(known["modules_to_save"], keys)
        known |= {key: value for key, value in HISTORY.items() if key in kind.model_fields}
        return build(kind, known, source=source)
    except ConfigError as error:
        raise FormatError(
            error.seen, problems=error.problems, meaning="The adapter's config cannot be used.", fix=error.fix
        ) from None


def _matching_patterns(known: Mapping[str, Any], keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """PEFT keeps patterns that match nothing; they say nothing about the tensors."""
    paths = {path for key in keys if (path := target_path(key))}
    for parameter in known.get("target_parameters") or ():
        paths |= {f"{path.replace('.base_layer', '')}.{parameter.rpartition('.')[2]}" for path in set(paths)}
    said = {key: known[key] for key in PATTERNS if known.get(key)}
    return {
        key: {pattern: value for pattern, value in found.items() if any(matches(pattern, p) for p in paths)}
        for key, found in said.items()
    }


def _refuse_foreign_meaning(fields: Mapping[str, Any], kind: type[MethodConfig], source: str) -> None:
    refused = [
        f"{key}: {fields[key]!r} is not supported"
        for key, neutral in NEUTRAL.items()
        if key in fields and key not in kind.model_fields and fields[key] not in neutral
    ]
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(EDITS_BASE):
        refused.append(
            f"init_lora_weights: {init!r} edits the base; in PEFT, save it as a plain LoRA with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter before training>)"
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
