"""Estimates of memory that were made before: a rehearsal takes seconds, reading its result a millisecond.

A kept estimate is valid for the same recipe, base, workload, machine and policy under the same versions and
the same files of this package. What cannot be read or written is estimated anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from graftlm.core.cache import cache_folder
from graftlm.core.errors import StorageError
from graftlm.core.files import json_text, write_atomic
from graftlm.core.version import __version__
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.estimates import MemoryEstimate, Part, Phase
from graftlm.planning.machine import Machine
from graftlm.planning.memory import estimate_memory
from graftlm.planning.workload import Workload
from graftlm.training.recipe import Recipe

FOLDER = "estimates"
MOST = 1000
"""Files; the oldest go."""
_OF_TIME = {
    *("train_rows", "train_tokens", "held_out_tokens", "steps", "eval_steps", "save_steps", "is_counted"),
    *("mean_batch_tokens", "mean_micro_batches", "mean_step_tokens"),
}
"""Figures of a workload that memory does not depend on."""


def kept_memory(
    recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine, *, recompute: str = "auto"
) -> MemoryEstimate:
    """As `planning.memory.estimate_memory`, from an earlier estimate where there is one."""
    given = workload.as_dict()
    parts = [
        _versions(),
        facts.as_dict(),
        {name: value for name, value in given.items() if name not in _OF_TIME},
        [machine.device, machine.memory_bytes, machine.idle_bytes, machine.cores, machine.instruction_sets],
        recompute,
        recipe.model.model_dump(),
        [type(recipe.method.config).__name__, recipe.method.as_dict(), recipe.task.as_dict()],
        recipe.data.model_dump(include={"max_length", "packing"}),
        recipe.train.model_dump(include={"per_device_train_batch_size", "optim", "recompute", "compile"}),
    ]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = cache_folder(FOLDER, f"{key}.json")
    found = _read(path)
    if found is None:
        found = estimate_memory(recipe, facts, workload, machine, recompute=recompute)
        _keep(path, found)
    return found


@cache
def _versions() -> str:
    """What an estimate depends on besides its arguments: versions, and every file of this package."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    stats = [
        (path.relative_to(root).as_posix(), (found := path.stat()).st_size, found.st_mtime_ns)
        for path in files
    ]
    return repr((torch.__version__, transformers.__version__, __version__, stats))


def _read(path: Path) -> MemoryEstimate | None:
    try:
        return estimate_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def estimate_of(content: Mapping[str, Any]) -> MemoryEstimate:
    """The inverse of `MemoryEstimate.as_dict`.

    Raises:
        KeyError, TypeError: it is none.
    """
    phases = tuple(
        Phase(phase["name"], tuple(Part(**part) for part in phase["parts"])) for phase in content["phases"]
    )
    return MemoryEstimate(phases, tuple(content["notes"]))


def _keep(path: Path, found: MemoryEstimate) -> None:
    try:
        write_atomic(path, json_text(found.as_dict()))
        kept = sorted(path.parent.glob("*.json"), key=os.path.getmtime)
        for old in kept[: len(kept) - MOST]:
            old.unlink(missing_ok=True)
    except (OSError, StorageError):
        return  # it is estimated anew next time
