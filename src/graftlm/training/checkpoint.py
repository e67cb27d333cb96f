"""Checkpoints: complete and verified, or absent. What is newest is derived, never pointed to.

`checkpoints/step-000100/` holds `trainable.safetensors`, `optimizer.safetensors` (see
`optimizer_state`), `state.json` and, written last, `MANIFEST.json`. Nothing in it names an
absolute path, so the run folder can be moved.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError
from graftlm.core.files import json_text, staged_directory, temporary_name, verify_manifest
from graftlm.core.seeding import capture_rng
from graftlm.core.storage import require_space, storage_errors, write_new
from graftlm.core.version import __version__
from graftlm.training.low_bit_optim import is_low_bit
from graftlm.training.optimizer_state import state_tensors
from graftlm.training.progress import Progress
from graftlm.training.tensors import tensor_bytes, write_tensors

STATE_SCHEMA = 1
FOLDER = "checkpoints"
TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"^step-(\d{6,})$")


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that cannot be used, and why."""

    path: Path
    why: str


@dataclass(frozen=True)
class Latest:
    """The newest usable checkpoint (None: there is none at all) and the newer ones that are not."""

    path: Path | None
    rejected: tuple[Rejected, ...]


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies.

    >>> checkpoint_path(Path("run"), 100).as_posix()
    'run/checkpoints/step-000100'
    """
    return run / FOLDER / f"step-{step:06d}"


def published(run: Path) -> dict[int, Path]:
    """Checkpoint folders by step, oldest first; they are not verified here."""
    folder = run / FOLDER
    paths = folder.iterdir() if folder.is_dir() else ()
    found = {int(match[1]): path for path in paths if (match := _NAME.match(path.name))}
    return dict(sorted(found.items()))


def latest(run: Path) -> Latest:
    """The newest complete checkpoint whose every byte verifies.

    Raises:
        CheckpointError: there are checkpoints and none of them verifies.
    """
    rejected = []
    for path in reversed(published(run).values()):
        try:
            verify_manifest(path)
        except CheckpointError as error:
            rejected.append(Rejected(path, "; ".join(error.problems) or error.seen))
        else:
            return Latest(path, tuple(rejected))
    if rejected:
        raise CheckpointError(
            f"None of the {len(rejected)} checkpoints in {run / FOLDER} can be used.",
            problems=[f"{item.path.name}: {item.why}" for item in rejected],
            meaning="They were damaged after they were written, or come from another version of Graft.",
            fix="Put back a copy of one, or remove the folder to start from the beginning.",
        )
    return Latest(None, ())


def set_aside(rejected: Rejected) -> Path:
    """Rename a rejected checkpoint, so that its step can be saved again and it can be looked at."""
    target = rejected.path.with_name(f"{rejected.path.name}.rejected-{secrets.token_hex(4)}")
    with storage_errors(target):
        os.rename(rejected.path, target)
    return target


def estimate_bytes(parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes one checkpoint will need: the parameters, AdamW's two moments of each, and the state."""
    named: dict[str, Tensor] = dict(parameters)
    return 3 * tensor_bytes(named) + 65536


def save(
    run: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
) -> Path:
    """Publish the checkpoint of `progress.step` and verify what was published.

    Args:
        identity: JSON values that must be the same on resume (data fingerprint, settings).

    Raises:
        StorageError: no space, or the disk refuses; nothing is published, older ones are intact.
        CheckpointError: what the disk gave back is not what was written.
    """
    trainable: dict[str, Tensor] = dict(parameters)
    moments = state_tensors(parameters, optimizer)
    state = {
        "schema": STATE_SCHEMA,
        "progress": progress.as_dict(),
        "identity": dict(identity),
        "parameters": {name: list(tensor.shape) for name, tensor in parameters.items()},
        "environment": environment(optimizer),
        "rng": capture_rng(),
    }
    text = json_text(state).encode()
    needed = tensor_bytes(trainable) + tensor_bytes(moments) + 2 * len(text)
    path = checkpoint_path(run, progress.step)
    require_space(path, needed)
    facts = {"kind": "checkpoint", "step": progress.step, "graftlm": __version__}
    with staged_directory(path, facts=facts, needed=needed) as staging:
        write_tensors(staging / TRAINABLE, trainable)
        write_tensors(staging / OPTIMIZER, moments)
        write_new(staging / STATE, [text])
    verify_manifest(path)
    return path


def environment(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What, if it changes, may change the last bits of a result."""
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return found | ({"bitsandbytes": version("bitsandbytes")} if is_low_bit(optimizer) else {})


def rotate(run: Path, *, keep: int, best_step: int | None) -> list[str]:
    """Remove all but the newest `keep` checkpoints and the best one; gives the removed names.

    Call it after `save`, which has verified the newest.
    """
    found = published(run)
    kept = {*list(found)[-max(1, keep) :], best_step}
    removed = []
    for step, path in found.items():
        if step not in kept:
            # Renamed first: a kill half-way must not leave a checkpoint with half its files.
            doomed = temporary_name(path)
            with storage_errors(path):
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            removed.append(path.name)
    return removed
