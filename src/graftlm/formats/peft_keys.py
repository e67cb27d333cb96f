"""PEFT's names of tensors, both directions. The only place in the package that spells them.

Keys are `base_model.model.<module path>.<suffix>`; the adapter's own name never appears in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from graftlm.methods.base import Part
from graftlm.methods.bias import BiasShift
from graftlm.methods.copies import FullCopy
from graftlm.methods.lora import LoraEmbedding, LoraLinear

PREFIX = "base_model.model."
FOREIGN_INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.")
"""Left in keys by tools that wrap a model before it is saved."""
BASE_WEIGHT = ".base_layer.weight"
"""PEFT writes the base's own embedding beside an adapter of an embedding."""

HEADS = ("classifier", "score")
"""PEFT lists both among the saved modules of any classifier; a model has one of them."""

SUFFIXES: Mapping[type[Part], Mapping[str, str]] = {
    LoraLinear: {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "shift.bias": "base_layer.bias"},
    LoraEmbedding: {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"},
    BiasShift: {"bias": "bias"},
}
"""Ends of keys by the names in `Part.saved()`; a class that is not listed uses its own names."""


def tensor_key(path: str, part: Part, parameter: str) -> str:
    """The key of one parameter of the part at `path`."""
    if isinstance(part, FullCopy):
        return f"{PREFIX}{path}.{parameter.removeprefix('module.')}"
    return f"{PREFIX}{path}.{SUFFIXES.get(type(part), {}).get(parameter, parameter)}"


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
    for suffix in (*SUFFIXES[LoraLinear].values(), *SUFFIXES[LoraEmbedding].values()):
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
