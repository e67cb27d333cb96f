"""A machine that is too small: a run in a process whose address space has a limit."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from case import BASE, KNOWN, Case, write_rows

from graftlm.verbs.diagnose import diagnose

LIMITED = Path(__file__).parents[1] / "limited.py"
SIZE = 32
SETTINGS = (
    "model.dtype=float32",
    "data.max_length=512",
    "train.max_steps=1",
    "train.gradient_accumulation_steps=1",
    "train.recompute=nothing",
    "train.compile=off",
    "output.report_to=none",
    "eval.before_after=false",
    f"eval.known_path={KNOWN}",
)


def _graft(limit: int, *arguments: str) -> tuple[int, int]:
    """The exit code, and the most address space that the process had."""
    command = [sys.executable, str(LIMITED), str(limit), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, int(done.stdout.splitlines()[-1])


def _tune(limit: int, folder: Path, size: int) -> tuple[int, int]:
    rows = [{"text": " ".join(str(i * j % 97) for j in range(300))} for i in range(SIZE + 2)]
    data, held_out = write_rows(folder / "long.jsonl", rows[2:]), write_rows(folder / "two.jsonl", rows[:2])
    own = (f"train.per_device_train_batch_size={size}", f"data.eval_path={held_out}")
    settings = [word for setting in (*SETTINGS, *own) for word in ("--set", setting)]
    out = str(folder / "run")
    return _graft(limit, "tune", str(data), "--model", BASE, "--task", "sft", *settings, "--out", out)


@functools.cache
def _limit() -> int:
    """Between what micro-batches of half the size take and what whole ones do."""
    if sys.platform != "linux":
        pytest.skip("address space is limited and told on Linux only")
    peaks = []
    for size in (SIZE // 2, SIZE):
        with tempfile.TemporaryDirectory() as folder:
            peaks.append(_tune(0, Path(folder), size)[1])
    return sum(peaks) // 2


def _too_large(folder: Path) -> Path:
    code, _ = _tune(_limit(), folder, SIZE)
    assert code == 1
    return folder / "run"


def _smaller(folder: Path) -> Path:
    """What the finding says of the run beside it, in a process with the same limit."""
    run = folder.parent / "broken" / "run"
    command = next(found.command for found in diagnose(run).findings if found.rule == "D06")
    words = command.replace("'", "").split()[1:]
    code, _ = _graft(_limit(), *words)
    assert code == 0, command
    return Path(words[-1])


CASES = (Case("D06", "micro-batch", _too_large, _smaller),)
