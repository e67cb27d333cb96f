"""PEFT's names of tensors, both directions. The only place in the package that spells them.

Keys are `base_model.model.<module path>.<suffix>`; the adapter's own name never appears in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from graftlm.methods.base import Part
from graftlm.methods.bias import BiasShift
from graftlm.methods.copies import FullCopy
from graftlm.methods.dora import DoraEmbedding, DoraLinear
from graftlm.methods.experts import ParameterLora
from graftlm.methods.ia3 import IA3Output
from graftlm.methods.low_rank import LoraEmbedding, LoraLinear
from graftlm.methods.tokens import NestedTokenRows
from graftlm.methods.virtual.rows import CacheTokens, InputTokens

PREFIX = "base_model.model."
SHORT_PREFIX = "base_model."
VIRTUAL_TOKENS = "prompt_embeddings"
"""The one tensor of prompt and prefix tuning, without any prefix."""
FOREIGN_INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.")
"""Left in keys by tools that wrap a model before it is saved."""
BASE_WEIGHT = ".base_layer.weight"
"""PEFT writes the base's own embedding beside an adapter of an embedding."""

HEADS = ("classifier", "score")
"""PEFT lists both among the saved modules of any classifier; a model has one of them."""

LINEAR = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_B_bias": "lora_B.bias",
    "shift.bias": "base_layer.bias",
}
EMBEDDING = {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"}
MAGNITUDE = "lora_magnitude_vector"

SUFFIXES: Mapping[type[Part], Mapping[str, str]] = {
    LoraLinear: LINEAR,
    LoraEmbedding: EMBEDDING,
    DoraLinear: {**{f"lora.{n}": key for n, key in LINEAR.items()}, "magnitude": MAGNITUDE},
    DoraEmbedding: {**{f"lora.{n}": key for n, key in EMBEDDING.items()}, "magnitude": MAGNITUDE},
    BiasShift: {"bias": "bias"},
    IA3Output: {"ia3_l": "ia3_l"},
    NestedTokenRows: {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"},
}
"""Ends of keys by the names in `Part.saved()`; a class that is not listed uses its own names."""


def tensor_key(path: str, part: Part, parameter: str) -> str:
    """The key of one parameter of the part at `path`."""
    if isinstance(part, InputTokens | CacheTokens):
        return parameter
    if isinstance(part, FullCopy):
        return f"{PREFIX}{path}.{parameter.removeprefix('module.')}"
    if isinstance(part, ParameterLora):  # PEFT nests one wrapper in another, the first parameter innermost
        _, name, factor = parameter.split(".")
        return f"{PREFIX}{path}.{'base_layer.' * part.outer(name)}{factor}.weight"
    return f"{PREFIX}{path}.{SUFFIXES.get(type(part), {}).get(parameter, parameter)}"


def as_in_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the keys of a file: beside virtual tokens, copies of modules lack a part."""
    has_virtual = VIRTUAL_TOKENS in tensors
    return {key.replace(PREFIX, SHORT_PREFIX, 1) if has_virtual else key: t for key, t in tensors.items()}


def from_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `as_in_file`."""
    has_virtual = VIRTUAL_TOKENS in tensors
    return {key.replace(SHORT_PREFIX, PREFIX, 1) if has_virtual else key: t for key, t in tensors.items()}


def clean_key(key: str) -> str:
    """A key as it would be without wrappers around the model.

    >>> clean_key("base_model.model._orig_mod.model.layers.0.q_proj.lora_A.weight")
    'base_model.model.model.layers.0.q_proj.lora_A.weight'
    """
    for infix in FOREIGN_INFIXES:
        key = key.replace(infix, "")
    return key


def target_path(key: str) -> str | None:
    """The module that a key adapts, or None for keys that are no adapter tensor.

    >>> target_path("base_model.model.model.layers.0.q_proj.lora_A.weight")
    'model.layers.0.q_proj'
    """
    kinds = (DoraLinear, DoraEmbedding, IA3Output)  # DoRA's tensors are LoRA's and one more
    for suffix in (suffix for kind in kinds for suffix in SUFFIXES[kind].values()):
        if key.endswith(f".{suffix}") and not suffix.startswith("base_layer"):
            return key.removeprefix(PREFIX).removesuffix(f".{suffix}")
    return None


def copied_paths(names: Sequence[str], keys: Iterable[str]) -> list[str]:
    """The modules that a file holds whole, where its config says `names` (endings of paths) are saved.

    A name without any tensor stays as it is, so that loading says what is missing.

    >>> copied_paths(["classifier", "score"], ["base_model.model.classifier.weight"])
    ['classifier']
    """
    found: dict[str, set[str]] = {name: set() for name in names}
    for key in keys:
        parts = key.removeprefix(PREFIX).split(".")[:-1] if target_path(key) is None else []
        paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
        for name in names:
            found[name].update(next(([path] for path in paths if path.endswith(name)), []))
    is_classifier = any(found.get(name) for name in HEADS)
    absent = [name for name in names if not found[name] and not (is_classifier and name in HEADS)]
    return sorted({*absent, *(path for paths in found.values() for path in paths)})
