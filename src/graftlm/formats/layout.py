"""An adapter on disk: `adapter_config.json` and `adapter_model.safetensors` as PEFT has them, `graft.json`.

Saving is deterministic to the byte and touches no network. Loading is strict: every tensor of the file is
applied and every parameter of the adapter is in the file, or nothing happens and each of them is named.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from graftlm.core.errors import FormatError
from graftlm.core.files import write_atomic
from graftlm.core.notices import notice
from graftlm.formats import peft_config
from graftlm.formats.ending import ending_facts
from graftlm.formats.fingerprint import BaseIdentity, identify
from graftlm.formats.peft_keys import BASE_WEIGHT, PREFIX, as_in_file, clean_key, from_file, tensor_key
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.copies import FullCopy
from graftlm.methods.site import base_modules
from graftlm.methods.tokens import TiedTokenRows, TokenRows

CONFIG, TENSORS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "graft.json"
SCHEMA = 1


class Folder:
    """Storage of adapters in folders; the one implementation of `Storage`."""

    def save(self, adapters: AdapterSet, directory: Path, name: str) -> None:
        """Write the three files into `directory` itself; an adapter that lies there already is an error."""
        if (directory / CONFIG).exists():
            raise FormatError(
                f"{directory} already holds an adapter.", fix="Choose another folder, or remove this one."
            )
        _require_folder(directory)
        base = identify(adapters.model, without=_copied(adapters, name))
        tensors = adapter_tensors(adapters, name)
        write_atomic(directory / TENSORS, save(tensors, metadata={"format": "pt"}))
        facts = {"schema": SCHEMA, **base.as_dict(), **ending_facts(adapters.model)}
        write_atomic(directory / EXTRA, _json(facts))
        write_atomic(directory / CONFIG, _json(peft_config.to_json(adapters, name, base.name)))

    def load(self, adapters: AdapterSet, directory: Path, name: str, *, strict: bool) -> None:
        """Read the adapter in `directory` as `name`, inactive and frozen; on any error nothing is added."""
        content, tensors = read_folder(directory)
        config = peft_config.from_json(content, tensors, str(directory / CONFIG))
        adapters.add(name, config)
        with ExitStack() as undo:
            undo.callback(adapters.delete, name)
            check_base(adapters.model, directory, _copied(adapters, name), strict=strict)
            fill(adapters, name, tensors, str(directory / TENSORS), strict=strict)
            undo.pop_all()


FOLDER = Folder()


def _copied(adapters: AdapterSet, name: str) -> list[str]:
    """Modules that the adapter answers for itself, whatever the base has there: copies, and tables that got
    new rows, which differ every time that a vocabulary is resized."""
    own = (FullCopy, TokenRows, TiedTokenRows)
    return [path for path, part in adapters.parts(name).items() if isinstance(part, own)]


def _require_folder(directory: Path) -> None:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise FormatError(
            f"{existing} is a file: nothing can be saved below it.", fix="Choose another folder."
        )


@dataclass(frozen=True)
class _Held:
    """A tensor of one part: where the part stands, its name there, the tensor."""

    path: str
    name: str
    tensor: Tensor


def _held(adapters: AdapterSet, name: str) -> dict[str, _Held]:
    """What a file of this adapter holds, by key; a parameter that stands at two places (tied) comes once."""
    found: dict[str, _Held] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for path, part in adapters.parts(name).items():
        for key, tensor in part.saved().items():
            place = (tensor.data_ptr(), tensor.shape)
            if place not in seen or not tensor.numel():
                found[tensor_key(path, part, key)] = _Held(path, key, tensor)
            seen.add(place)
    return found


def adapter_tensors(adapters: AdapterSet, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter under PEFT's keys, contiguous, on the CPU, sorted by key.

    Raises:
        FormatError: a tensor is empty (sharded away) or not finite.
    """
    found = {key: held.tensor.cpu().contiguous() for key, held in _held(adapters, name).items()}
    bad = [key for key, tensor in found.items() if tensor.numel() == 0 or not torch.isfinite(tensor).all()]
    if bad:
        raise FormatError(
            f"Adapter {name!r} has tensors that are empty or not finite.",
            problems=bad[:10],
            meaning="The training diverged, or the parameters live on another process.",
        )
    return dict(sorted(as_in_file(found).items()))


def read_folder(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config fields and tensors of an adapter folder, as they are.

    Raises:
        FormatError: a file is missing, damaged, or of a format that can run code.
    """
    if not (directory / CONFIG).is_file():
        inner = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG}")) if directory.is_dir() else []
        raise FormatError(
            f"{directory} holds no {CONFIG}.",
            meaning="It is not an adapter folder.",
            fix=f"Did you mean {directory / inner[0]}?"
            if inner
            else "Give the folder that holds the adapter.",
        )
    if not (directory / TENSORS).is_file():
        has_pickle = (directory / "adapter_model.bin").exists()
        raise FormatError(
            f"{directory} holds no {TENSORS}.",
            meaning="adapter_model.bin is a pickle, which can run code when it is read."
            if has_pickle
            else "",
            fix="Save the adapter again with safetensors.",
        )
    return _read_json(directory / CONFIG), _read_tensors(directory / TENSORS)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path} is not valid JSON: {error}.", meaning="The file is damaged or cut off."
        ) from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds {type(content).__name__}, not an object.")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {clean_key(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read: {error}.",
            meaning="The file is damaged or cut off, for instance by a full disk or a broken download.",
            fix="Copy or train the adapter again.",
        ) from None
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise FormatError(
            f"{path} holds NaN or infinity.", problems=bad[:10], meaning="The training diverged."
        )
    return from_file(tensors)


def check_base(model: nn.Module, directory: Path, copied: Sequence[str], *, strict: bool) -> None:
    """Compare the base, but for what is `copied`, with the one that `graft.json` names, if it is there.

    Raises:
        FormatError: they differ, and `strict` is true; otherwise it is a warning.
    """
    theirs = _stored_base(directory)
    if theirs is None:
        return
    ours = identify(model, without=copied)
    if ours.is_same(theirs) or ours.is_close(theirs):
        _say_other_storage(directory, theirs, ours)
        return
    message = f"The adapter in {directory} was trained on another base ({theirs.name or 'unnamed'})."
    if strict:
        raise FormatError(
            message,
            meaning=f"The weights of this base ({ours.name or 'unnamed'}) are not those it was trained on.",
            fix="Load the base that it names. From Python, strict=False skips this check.",
        )
    warnings.warn(message, stacklevel=5)


def other_base(adapters: AdapterSet, directory: Path, name: str) -> BaseIdentity | None:
    """The base that `graft.json` in `directory` names, where it is another one than this model; else None."""
    theirs = _stored_base(directory)
    ours = identify(adapters.model, without=_copied(adapters, name))
    return None if theirs is None or ours.is_same(theirs) or ours.is_close(theirs) else theirs


def _stored_base(directory: Path) -> BaseIdentity | None:
    path = directory / EXTRA
    return BaseIdentity.from_dict(_read_json(path), str(path)) if path.is_file() else None


def _say_other_storage(directory: Path, theirs: BaseIdentity, ours: BaseIdentity) -> None:
    then, now = (found.scheme.kind if found.scheme else "16 or 32 bits" for found in (theirs, ours))
    if then != now:
        notice(
            f"The adapter in {directory} was trained on its base in {then}; here the base is in {now}. "
            "It works, and what it says differs by what quantising the base changes."
        )


def fill(adapters: AdapterSet, name: str, tensors: dict[str, Tensor], source: str, *, strict: bool) -> None:
    """Put the tensors of a file, by key, into an adapter that exists; `source` names them in errors.

    Raises:
        FormatError: a tensor is missing, unexpected or of another shape; nothing was put.
    """
    parts = adapters.parts(name)
    wanted, problems = _fitting(adapters, name, tensors)
    if problems and strict:
        raise FormatError(
            f"{source} does not fit this model ({len(problems)} tensors).",
            problems=[
                *problems[:10],
                *([f"... and {len(problems) - 10} more"] if len(problems) > 10 else []),
            ],
            meaning="It was made for another base, or by a tool that names things differently.",
            fix="Load the base that the adapter names in adapter_config.json.",
        )
    if problems:
        warnings.warn(f"{source}: not applied: {'; '.join(problems)}", stacklevel=5)
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(wanted.keys() & tensors.keys()):
        found.setdefault(wanted[key].path, {})[wanted[key].name] = tensors[key]
    for path, own in found.items():
        parts[path].load_saved(own)


def misfits(adapters: AdapterSet, name: str, tensors: dict[str, Tensor]) -> list[str]:
    """Every tensor of a file, by key, that an adapter has no place for, or not of that shape, and every one
    that the file lacks: what `fill` refuses. Empty where all fits."""
    return _fitting(adapters, name, tensors)[1]


def _fitting(
    adapters: AdapterSet, name: str, tensors: dict[str, Tensor]
) -> tuple[dict[str, _Held], list[str]]:
    """What the adapter holds, without what has another shape in the file; and all that does not fit."""
    wanted = _held(adapters, name)
    problems = [f"missing: {key}" for key in sorted(wanted.keys() - tensors.keys())]
    for key in sorted(tensors.keys() - wanted.keys()):
        problems += _unexpected(adapters.model, key, tensors[key])
    for key in sorted(wanted.keys() & tensors.keys()):
        shape = wanted[key].tensor.shape
        if shape != tensors[key].shape:
            problems.append(f"shape of {key}: {list(tensors[key].shape)}, expected {list(shape)}")
            del wanted[key]
    return wanted, problems


def _unexpected(model: nn.Module, key: str, tensor: Tensor) -> list[str]:
    """A copy of the base's own embedding is harmless; anything else would be silently lost."""
    path = key.removeprefix(PREFIX).removesuffix(BASE_WEIGHT).removesuffix(".weight")
    base = base_modules(model).get(path)
    if not isinstance(base, nn.Embedding | nn.Linear):
        return [f"unexpected: {key}"]
    weight = base.weight
    if weight.shape == tensor.shape and torch.equal(weight.float(), tensor.float()):
        return []
    return [f"other base weight: {key} differs from this model's"]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
