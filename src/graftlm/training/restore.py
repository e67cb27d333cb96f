"""Reading a checkpoint back: everything is checked before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftlm.core.errors import CheckpointError
from graftlm.core.files import verify_manifest
from graftlm.core.seeding import restore_rng
from graftlm.training.checkpoint import OPTIMIZER, STATE, STATE_SCHEMA, TRAINABLE, environment
from graftlm.training.optimizer_state import load_state
from graftlm.training.progress import Progress
from graftlm.training.tensors import read_tensors


@dataclass(frozen=True)
class Restored:
    """Where the run is now, and what keeps it from repeating the interrupted run to the last bit."""

    progress: Progress
    notes: tuple[str, ...]


def restore(
    path: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> Restored:
    """Put parameters, optimizer and random state back to what `save` wrote, or change nothing.

    Raises:
        CheckpointError: the folder is damaged, or was written with other data, settings or parameters.
    """
    verify_manifest(path)
    state = _read_state(path)
    _require_same(path, state["identity"], json.loads(json.dumps(dict(identity))))
    trainable = read_tensors(path / TRAINABLE, dict(parameters))
    stored = path / OPTIMIZER
    put_state = load_state(
        parameters, optimizer, _tensor_names(stored), lambda expected: read_tensors(stored, expected)
    )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trainable[name])
    put_state()
    notes = restore_rng(state["rng"])
    notes += [
        f"{key} was {state['environment'].get(key)} when the checkpoint was written and is {value} now: "
        "the last bits of the result may differ from an uninterrupted run."
        for key, value in environment(optimizer).items()
        if state["environment"].get(key) != value
    ]
    return Restored(Progress(**state["progress"]), tuple(notes))


def load_trainable(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy only the trained tensors of a checkpoint into `parameters`, after verifying it.

    Raises:
        CheckpointError: the folder is damaged or holds other tensors; nothing is changed.
    """
    verify_manifest(path)
    trainable = read_tensors(path / TRAINABLE, dict(parameters))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trainable[name])


def _read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["schema"] != STATE_SCHEMA:
        raise CheckpointError(
            f"{path / STATE} has schema {state['schema']!r}; this version reads {STATE_SCHEMA}.",
            meaning="It was written by another version of Graft.",
            fix="Update Graft (pip install -U graftlm).",
        )
    return state


def _require_same(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    problems = [
        f"{key}: was {saved.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if problems:
        raise CheckpointError(
            f"{path} belongs to another run: data or settings changed since it was written.",
            problems=problems,
            meaning="Going on would mix two runs, and neither result could be repeated.",
            fix="Put the data and the recipe back as they were, or start in a new folder (--out).",
        )


def _tensor_names(path: Path) -> frozenset[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return frozenset(handle.keys())
