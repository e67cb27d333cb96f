"""Adapter files read and written without the model they belong to, for what needs only their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from graftlm.core.errors import AdapterError
from graftlm.core.files import write_atomic
from graftlm.formats import peft_config
from graftlm.formats.fingerprint import BaseIdentity
from graftlm.formats.layout import CONFIG, EXTRA, SCHEMA, TENSORS, read_folder
from graftlm.formats.peft_keys import BASE_WEIGHT, PREFIX, SUFFIXES
from graftlm.methods.base import MethodConfig, Part
from graftlm.methods.bias import BiasShift
from graftlm.methods.combining.terms import COPY, PlainAdapter
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config, IA3Output
from graftlm.methods.lora import LoraConfig
from graftlm.methods.low_rank import LoraEmbedding, LoraLinear
from graftlm.methods.tokens import NestedTokenRows, TokenRows, TrainableTokensConfig

KINDS: Mapping[type[MethodConfig], Sequence[type[Part]]] = {
    LoraConfig: (LoraLinear, LoraEmbedding, BiasShift, NestedTokenRows),
    IA3Config: (IA3Output,),
    TrainableTokensConfig: (TokenRows,),
}
"""The parts that files of a method hold, beside copies of modules."""


@dataclass(frozen=True)
class AdapterFiles:
    """What lies in an adapter folder."""

    folder: Path
    content: Mapping[str, Any]
    """Of `adapter_config.json`."""
    adapter: PlainAdapter
    embeddings: Mapping[str, Tensor]
    """The base's own embeddings by key, which PEFT writes beside some adapters."""
    base: BaseIdentity | None
    """The base that `graft.json` names."""

    @property
    def copied(self) -> frozenset[str]:
        """Modules that the adapter replaces whole; its `base` says nothing about those."""
        return copied_by(self.adapter)

    @property
    def base_name(self) -> str:
        """What `adapter_config.json` calls the base, or nothing."""
        return str(self.content.get("base_model_name_or_path") or "")


def copied_by(adapter: PlainAdapter) -> frozenset[str]:
    """Paths of the modules that an adapter replaces whole."""
    copied = adapter.config.modules_to_save or ()
    if isinstance(adapter.config, FullConfig) and adapter.config.parts != "biases":
        copied = (*copied, *adapter.parts)
    return frozenset(copied)


def read_files(folder: Path) -> AdapterFiles:
    """Read an adapter folder.

    Raises:
        FormatError: a file is missing, damaged, or needs what this version does not have.
    """
    content, tensors = read_folder(folder)
    config = peft_config.from_json(content, tensors, str(folder / CONFIG))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, name = _split(key, config)
        parts.setdefault(path, {})[name] = tensor
    embeddings = _take_embeddings(parts)
    return AdapterFiles(folder, content, PlainAdapter(config, parts), embeddings, _base(folder))


def write_files(
    folder: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], extra: Mapping[str, Any] | None
) -> None:
    """Write an adapter folder; the config comes last, so that half a folder is no adapter.

    Args:
        extra: what `graft.json` says; None for no such file, where nobody knows the base's fingerprint.
    """
    ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
    write_atomic(folder / TENSORS, save(ordered, metadata={"format": "pt"}))
    if extra is not None:
        write_atomic(folder / EXTRA, _json({"schema": SCHEMA, **extra}))
    write_atomic(folder / CONFIG, _json(content))


def content_of(adapter: PlainAdapter, sources: Sequence[AdapterFiles], base_name: str) -> dict[str, Any]:
    """`adapter_config.json` of an adapter that was made from those of `sources`."""
    fields = {**sources[0].content, **adapter.config.model_dump(mode="json")}
    fields |= {key: value for key, value in peft_config.HISTORY.items() if key in fields}
    fields = {
        k: v for k, v in fields.items() if k not in peft_config.OURS_ALONE.get(adapter.config.peft_type, ())
    }
    fields |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "peft_type": adapter.config.peft_type,
    }
    if any("fan_in_fan_out" in source.content for source in sources):
        fields["fan_in_fan_out"] = any(source.content.get("fan_in_fan_out") for source in sources)
    return fields


def tensors_of(adapter: PlainAdapter, sources: Sequence[AdapterFiles]) -> dict[str, Tensor]:
    """Tensors under PEFT's keys, with the embeddings that the sources carry.

    Raises:
        AdapterError: two sources carry different ones.
    """
    ends = _key_ends(adapter.config)
    found = {
        _key(path, name, ends): tensor
        for path, part in adapter.parts.items()
        for name, tensor in part.items()
    }
    carried: dict[str, Tensor] = {}
    for source in sources:
        for key, tensor in source.embeddings.items():
            known = carried.setdefault(key, tensor)
            if known.shape != tensor.shape or not torch.equal(known.float(), tensor.float()):
                raise AdapterError(
                    f"The adapters carry different embeddings of their base: {key}.",
                    meaning="They belong to different bases, or the embeddings were trained beside them.",
                    fix="Combine adapters of one base.",
                )
    return {**carried, **found}


def _key_ends(config: MethodConfig) -> dict[str, str]:
    """Ends of keys by the names in `Part.saved`, longest first."""
    kinds = KINDS.get(type(config), ())
    names = {name: suffix for kind in kinds for name, suffix in SUFFIXES.get(kind, {}).items()}
    return dict(sorted(names.items(), key=lambda item: -len(item[1])))


def _split(key: str, config: MethodConfig) -> tuple[str, str]:
    """(module path, name in `Part.saved`); what is not known keeps its last word as its name."""
    key = key.removeprefix(PREFIX)
    for path in config.modules_to_save or ():
        if key.startswith(f"{path}."):
            return path, COPY + key.removeprefix(f"{path}.")
    for name, suffix in _key_ends(config).items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), name
    if key.endswith(BASE_WEIGHT):
        return key.removesuffix(BASE_WEIGHT), BASE_WEIGHT
    path, _, leaf = key.rpartition(".")
    return path, COPY + leaf if isinstance(config, FullConfig) else leaf


def _take_embeddings(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Take the base's own embeddings, which PEFT writes beside some adapters, out of `parts`; by key."""
    found = {}
    for path, part in list(parts.items()):
        is_plain = part.keys() == {"weight"} and not any(path.startswith(f"{other}.") for other in parts)
        for name in (BASE_WEIGHT, *(["weight"] if is_plain else [])):
            if name in part:
                found[f"{PREFIX}{path}.{name.removeprefix('.')}"] = part.pop(name)
        if not part:
            del parts[path]
    return found


def _key(path: str, name: str, ends: Mapping[str, str]) -> str:
    return f"{PREFIX}{path}.{name.removeprefix(COPY) if name.startswith(COPY) else ends.get(name, name)}"


def _base(folder: Path) -> BaseIdentity | None:
    path = folder / EXTRA
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return BaseIdentity.from_dict(content, str(path))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
