"""What a config in PEFT's words means on a given model: one of Graft's own configs, or a refusal."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from enum import Enum
from typing import Any

from torch import nn

from graftlm.core.errors import ConfigError, TargetError
from graftlm.formats.peft_config import INERT, NEUTRAL
from graftlm.integrations.peft_api.configs import LoraConfig, PeftConfig, PeftType, TaskType
from graftlm.integrations.peft_api.defaults import ia3_targets, lora_targets
from graftlm.methods.base import MethodConfig
from graftlm.methods.families import ROLES
from graftlm.methods.site import base_modules
from graftlm.methods.table import method

HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Modules that are new in a model for such a task, and so are trained whole."""

NO_MEANING: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    **dict.fromkeys(("token_dim", "num_transformer_submodules"), (None,)),
    **dict.fromkeys(("num_attention_heads", "num_layers"), (None,)),
    **dict.fromkeys(("encoder_hidden_size", "init_weights", "tokenizer_kwargs"), (None, {})),
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"), (None, [], ())),
}
"""Fields by the values at which they say nothing, for methods that have no such field."""


def method_config(config: PeftConfig, model: nn.Module) -> MethodConfig:
    """Graft's config for what `config` means on `model`.

    Raises:
        ConfigError: fields with a meaning that Graft does not have, all of them at once.
        TargetError: no target modules are named and none are known for this architecture.
    """
    if not isinstance(config, PeftConfig):
        raise ConfigError(
            f"{type(config).__module__}.{type(config).__qualname__} is not one of the configs here.",
            meaning="The names of two libraries are mixed.",
            fix="Import the config from graftlm.integrations.peft_api too.",
        )
    if config.peft_type is None:
        raise ConfigError(
            "A PeftConfig without a method.", fix="Use LoraConfig, IA3Config or another of its kinds."
        )
    kind = method(config.peft_type.value)
    given = {key: plain(value) for key, value in config.to_dict().items()}
    _refuse_unknown_meaning(config, kind, given)
    fields = {key: value for key, value in given.items() if key in kind.model_fields and value is not None}
    fields |= _targets(config, model, fields)
    fields["modules_to_save"] = _saved_modules(config, model)
    return kind(**fields)


def plain(value: Any) -> Any:
    """A value as JSON has it: enumerations by their value, sets sorted."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else value


def _refuse_unknown_meaning(config: PeftConfig, kind: type[MethodConfig], given: dict[str, Any]) -> None:
    refused = []
    for key, value in given.items():
        neutral = (
            *NO_MEANING.get(key, ()),
            type(config).model_fields[key].get_default(call_default_factory=True),
        )
        if key not in kind.model_fields and key not in INERT and value not in neutral:
            refused.append(f"{key}: {value!r} is not supported")
    if isinstance(config, LoraConfig) and given["ensure_weight_tying"]:
        refused.append("ensure_weight_tying: adapters of tied weights are not tied; a merge unties them")
    if refused:
        raise ConfigError(
            f"This {type(config).__name__} asks for what Graft does not have.",
            problems=refused,
            meaning="Training without it would be another method.",
            fix="Leave these fields out, or use PEFT for this adapter.",
        )


def _targets(config: PeftConfig, model: nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    """`target_modules` as PEFT understands them, where the method has them."""
    named = fields.get("target_modules")
    if config.peft_type is PeftType.LORA and named is None:
        return {} if fields.get("target_parameters") else {"target_modules": lora_targets(model)}
    if config.peft_type is PeftType.IA3:
        listed = ia3_targets(model) if named is None else None
        if listed is not None:
            return {"target_modules": listed[0], "feedforward_modules": listed[1]}
        return {"feedforward_modules": fields.get("feedforward_modules", ())} if named is not None else {}
    if isinstance(named, str | None):
        return {}
    return {"target_modules": _present(model, named)}


def _present(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names that this model has; scripts list the names of several architectures at once."""
    paths = list(base_modules(model))
    names = list(names)
    found = [n for n in names if n in ROLES or any(p == n or p.endswith(f".{n}") for p in paths)]
    absent = [name for name in names if name not in found]
    if absent and found:
        warnings.warn(
            f"target_modules: this model has no {', '.join(absent)}; the others are adapted.", stacklevel=6
        )
    return found or names


def _saved_modules(config: PeftConfig, model: nn.Module) -> tuple[str, ...] | None:
    """`modules_to_save`, and the new head of a classifier, as PEFT adds it."""
    given = config.modules_to_save
    names = [given] if isinstance(given, str) else sorted(given or ())
    paths = list(base_modules(model))
    heads = HEADS.get(config.task_type, ()) if config.task_type is not None else ()
    found = [head for head in heads if any(p == head or p.endswith(f".{head}") for p in paths)]
    if heads and not found and not names:
        raise TargetError(
            f"task_type is {config.task_type}, but the model has no {' or '.join(heads)}.",
            meaning="The model has no such head, or calls it something else.",
            fix="Name it: modules_to_save=['...'], or leave task_type out.",
        )
    # A head that was named in full is not named again.
    names += [head for head in found if not any(n == head or n.endswith(f".{head}") for n in names)]
    return tuple(names) or None
