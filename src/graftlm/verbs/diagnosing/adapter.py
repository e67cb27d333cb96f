"""Gathers `AdapterFacts`: of an adapter folder, or of the newest checkpoint of a run that has none yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graftlm.diagnosis.facts.adapter import AdapterFacts, LayerChange
from graftlm.formats.layout import TENSORS, read_folder
from graftlm.formats.without_model import read_files
from graftlm.methods.base import MethodConfig
from graftlm.methods.combining.factors import Factors
from graftlm.methods.combining.lora import PAIRS
from graftlm.methods.lora import LoraConfig
from graftlm.training.checkpoint import OPTIMIZER, TRAINABLE, latest, published
from graftlm.verbs.diagnosing.subject import Subject

SIDES = dict(PAIRS)
"""The name of B by that of A."""


def adapter_facts(subject: Subject) -> AdapterFacts | None:
    """None where nothing was trained yet.

    Raises:
        FormatError: an adapter cannot be read; CheckpointError: no checkpoint verifies.
    """
    newest = latest(subject.run).path if subject.run is not None and published(subject.run) else None
    without_state = None if newest is None else _without_state(newest)
    if subject.adapter is not None:
        return _of_folder(subject.adapter, without_state)
    recipe = subject.recipe()
    if newest is None or recipe is None:
        return None
    return _of_checkpoint(newest, recipe.method.config, without_state)


def spectrum(a: Tensor, b: Tensor, scaling: float) -> tuple[float, ...]:
    """Singular values of `scaling` B A, from QR decompositions of the thin factors.

    >>> [round(value, 3) for value in spectrum(torch.eye(2, 5), 3 * torch.eye(4, 2), 0.5)]
    [1.5, 1.5]
    """
    upper = torch.linalg.qr(b.double(), mode="r")[1]
    lower = torch.linalg.qr(a.double().mT, mode="r")[1]
    values: list[float] = (torch.linalg.svdvals(upper @ lower.mT) * abs(scaling)).tolist()
    return tuple(values)


def _of_folder(folder: Path, without_state: tuple[str, ...] | None) -> AdapterFacts:
    if broken := _broken(folder):
        return broken  # who reads adapters to use them refuses such a file; here it is what was looked for
    content, tensors = read_folder(folder)
    plain = read_files(folder).adapter
    layers = _changes(plain.parts, plain.config)
    return AdapterFacts(
        kind=str(content.get("peft_type", "")),
        config=dict(content),
        tensors=_listed(tensors),
        layers=layers,
        still=None if layers is None else tuple(layer.path for layer in layers if layer.is_zero),
        trained=len(plain.parts),
        without_state=without_state,
    )


def _broken(folder: Path) -> AdapterFacts | None:
    """Of an adapter that holds what is no number; None of a sound one, or where there is no file."""
    path = folder / TENSORS
    try:
        tensors = load_file(path) if path.is_file() else {}
    except SafetensorError:
        return None  # a damaged file is refused by its reader, with the reason
    found = _not_finite(tensors)
    return AdapterFacts(tensors=_listed(tensors), not_finite=found) if found else None


def _of_checkpoint(
    checkpoint: Path, config: MethodConfig, without_state: tuple[str, ...] | None
) -> AdapterFacts:
    tensors = load_file(checkpoint / TRAINABLE)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        parts.setdefault(path, {})[leaf] = tensor
    layers = _changes(parts, config)
    return AdapterFacts(
        kind=config.peft_type,
        tensors=_listed(tensors),
        layers=layers,
        not_finite=_not_finite(tensors),
        still=None if layers is None else tuple(layer.path for layer in layers if layer.is_zero),
        trained=len(parts),
        without_state=without_state,
    )


def _changes(
    parts: Mapping[str, Mapping[str, Tensor]], config: MethodConfig
) -> tuple[LayerChange, ...] | None:
    if not isinstance(config, LoraConfig):
        return None
    scaling: Callable[[str], float] = config.scaling_at
    found = []
    for path, part in parts.items():
        for name in SIDES.keys() & part.keys():
            factors = Factors(part[name], part[SIDES[name]])
            if factors.a.dim() == 2 and bool(
                torch.isfinite(factors.a).all() & torch.isfinite(factors.b).all()
            ):
                found.append(LayerChange(path, factors.rank, spectrum(factors.a, factors.b, scaling(path))))
    return tuple(found)


def _listed(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple(
        (key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for key, tensor in tensors.items()
    )


def _not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all()))


def _without_state(checkpoint: Path) -> tuple[str, ...]:
    """Parameters that no update has touched: the optimizer keeps nothing about them."""
    trained, states = load_file(checkpoint / TRAINABLE), load_file(checkpoint / OPTIMIZER)
    known = {key.partition("/")[2] for key in states}
    return tuple(name for name in trained if name not in known)
