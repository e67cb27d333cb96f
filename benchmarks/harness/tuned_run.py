"""`graft tune` on a shared task, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.writer import SHARED

QUIET = (
    "data.eval_fraction=0.05",
    "train.eval_steps=100000",
    "train.save_steps=100000",
    "output.report_to=none",
)
"""Settings that leave a run nothing to do but to train and to measure at its ends."""
NOTHING_TO_TRAIN = "This model has no"


@dataclass(frozen=True)
class TunedRun:
    """What a run left behind."""

    out: Path
    figures: dict[str, Any]
    """What the command prints with --json."""

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder."""
        found: dict[str, Any] = json.loads((self.out / name).read_text(encoding="utf-8"))
        return found

    @property
    def file_bytes(self) -> int:
        """Of the adapter."""
        return (self.out / "adapter" / "adapter_model.safetensors").stat().st_size


def tuned(task: str, model: str, settings: Sequence[str], out: Path) -> TunedRun | None:
    """Train on the task's training rows; None where the base has nothing that the method trains.

    Raises:
        SystemExit: the run failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "graftlm", "tune", str(SHARED / "data" / task / "train.jsonl")]
    command += ["--model", str(SHARED / "models" / model), "--out", str(out), "--json"]
    command += [part for setting in (*QUIET, *settings) for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    if done.returncode and NOTHING_TO_TRAIN in done.stderr:
        return None
    if not (out / "report.json").is_file():
        raise SystemExit(f"{task} on {model}: {', '.join(settings)}\n{done.stderr[-2000:]}")
    return TunedRun(out, json.loads(done.stdout.strip().splitlines()[-1]))
