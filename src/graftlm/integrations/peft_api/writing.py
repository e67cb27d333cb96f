"""Adapters into folders as PEFT places them, and into checkpoints that transformers' Trainer can resume."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from graftlm.core.errors import CheckpointError
from graftlm.core.files import write_atomic
from graftlm.formats.layout import CONFIG, FOLDER
from graftlm.methods.adapter_set import AdapterSet

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""How transformers' Trainer names the folders that it resumes from."""
WEIGHTS = "model.safetensors"
"""The file there that it hands to `load_state_dict`."""


def save_adapters(adapters: AdapterSet, folder: Path, names: Sequence[str]) -> None:
    """Write adapters, `default` into `folder` itself and others below it, replacing what lies there."""
    for name in names:
        replace_adapter(adapters, folder_of(folder, name), name)


def folder_of(folder: Path, name: str) -> Path:
    """Where PEFT keeps the adapter `name` of those that are saved in `folder`."""
    return folder if name == "default" else folder / name


def add_trainer_state(adapters: AdapterSet, folder: Path) -> None:
    """Let transformers' own Trainer resume from `folder`, where it is one of its checkpoints."""
    if CHECKPOINT.fullmatch(folder.name):
        write_trainer_state(adapters, folder / WEIGHTS)


def write_trainer_state(adapters: AdapterSet, file: Path) -> None:
    """Write `trainer_state` as one safetensors file."""
    write_atomic(file, save(trainer_state(adapters), metadata={"format": "pt"}))


def replace_adapter(adapters: AdapterSet, folder: Path, name: str) -> None:
    """Save one adapter where another may lie: all files are written beside it, and the config is put last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as beside:
        FOLDER.save(adapters, Path(beside), name)
        for file in sorted(Path(beside).iterdir(), key=lambda path: path.name == CONFIG):
            os.replace(file, folder / file.name)


def trainer_state(adapters: AdapterSet) -> dict[str, Tensor]:
    """Everything that training of the adapters goes on from, by `<adapter>:<path>:<name>`.

    These are the parameters as they are trained; a file in PEFT's layout can hold less (a folded prefix).
    """
    return {
        f"{name}:{path}:{key}": tensor.detach().cpu().clone()
        for name in adapters.names
        for path, part in adapters.parts(name).items()
        for key, tensor in part.state_dict().items()
    }


def is_trainer_state(adapters: AdapterSet, state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is one of `trainer_state`."""
    return bool(state) and all(key.partition(":")[0] in adapters and ":" in key for key in state)


def load_trainer_state(adapters: AdapterSet, state: Mapping[str, Tensor]) -> None:
    """The inverse of `trainer_state`.

    Raises:
        CheckpointError: tensors are missing, unexpected or of other shapes; nothing was changed.
    """
    here = {key: tensor.shape for key, tensor in trainer_state(adapters).items()}
    there = {key: tensor.shape for key, tensor in state.items()}
    wrong = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    if wrong:
        raise CheckpointError(
            f"The checkpoint does not fit the adapters of this model ({len(wrong)} tensors).",
            problems=wrong[:10],
            fix="Attach the adapters that the interrupted run had, with the same configs and names.",
        )
    for name in adapters.names:
        for path, part in adapters.parts(name).items():
            own = f"{name}:{path}:"
            part.load_state_dict({key: state[f"{own}{key}"] for key in part.state_dict()})
