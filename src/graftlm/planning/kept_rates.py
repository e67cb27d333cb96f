"""The calibration of this machine, kept in the user's cache folder.

A measurement is valid for one device with one number of threads under one set of versions. One that was
taken while other programs were at work is taken again when the machine is quieter. A file that is damaged, of
another machine or not writable is no error: the machine is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from graftlm.core.cache import cache_folder
from graftlm.core.environment import Environment
from graftlm.core.errors import StorageError
from graftlm.core.files import json_text, write_atomic
from graftlm.core.progress import say
from graftlm.planning.calibration import measure_rates
from graftlm.planning.machine import Rates

SCHEMA = 2
"""Raised when what is measured changes."""
FOLDER = "machines"
_ASK = """
import json, resource, sys
from pathlib import Path
import graftlm.verbs.tune
status = Path("/proc/self/status")  # getrusage(2) would tell the peak of the process that started this one
lines = status.read_text().splitlines() if status.exists() else []
peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
peak = int(peaks[0]) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(peak if sys.platform == "darwin" else peak * 1024))
"""
BUSY = 0.5
"""Other programs' processes per core from which on a measurement is not trusted for good."""
_USUAL_IDLE, _USUAL_START = 400 * 2**20, 6.0


@dataclass(frozen=True)
class Calibration:
    """What was measured of this machine, and when."""

    rates: Rates
    idle_bytes: int
    """Of a fresh process with everything imported that `graft tune` imports."""
    start_seconds: float
    """Until that process had imported it."""
    day: str
    others: float = 0.0
    """Processes that wanted to run, per core, in the minute before: other programs' work."""

    @property
    def source(self) -> str:
        """For people."""
        busy = ", while other programs were at work" if self.others > BUSY else ""
        return f"measured here on {self.day}{busy}"


def kept_or_measured(found: Environment, *, measure_now: bool) -> Calibration | None:
    """The kept calibration of this machine; where there is no good one, a new one if `measure_now`."""
    device = torch.device("cuda" if found.gpus else "cpu")
    path = cache_folder(FOLDER, f"{_key(found, device)}.json")
    kept = _read(path)
    if not measure_now or (kept is not None and not _is_quieter(kept, found.cores)):
        return kept
    say("Measuring this machine once: matrix products, memory, disk ...")
    measured = _measure(device, path.parent, _others(found.cores))
    _keep(path, measured)
    return measured


def _key(found: Environment, device: torch.device) -> str:
    """Everything that rates depend on, in one name."""
    parts = [
        *(str(SCHEMA), found.cpu, str(found.cores), *found.instruction_sets, str(found.memory_bytes)),
        *(str(torch.get_num_threads()), device.type, *(gpu.name for gpu in found.gpus)),
        *(
            f"{name} {version}"
            for name, version in found.packages.items()
            if name in ("torch", "transformers")
        ),
        *(found.python, found.graft),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_quieter(kept: Calibration, cores: int) -> bool:
    """Whether a measurement now promises better figures than the kept one."""
    return kept.others > BUSY and _others(cores) < 0.5 * kept.others


def _others(cores: int) -> float:
    """Work of other programs per core; 0 where the system does not tell."""
    return os.getloadavg()[0] / max(1, cores) if hasattr(os, "getloadavg") else 0.0


def _measure(device: torch.device, folder: Path, others: float) -> Calibration:
    rates = measure_rates(device, folder if _is_writable(folder) else None)
    idle, start = _fresh_process()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        idle = max(0, total - free - torch.cuda.memory_reserved(device))
    day = datetime.now(UTC).date().isoformat()
    return Calibration(rates, idle, start, day, round(others, 2))


def _fresh_process() -> tuple[int, float]:
    """Resident bytes of a new process that has imported what `graft tune` needs, and its seconds."""
    started = time.monotonic()
    # -P: a file of the current folder must not stand in for a module of the same name.
    done = subprocess.run([sys.executable, "-P", "-c", _ASK], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip().isdigit():
        return _USUAL_IDLE, _USUAL_START  # no resource module on this system
    return int(done.stdout), time.monotonic() - started


def _read(path: Path) -> Calibration | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _calibration(content)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _calibration(content: dict[str, Any]) -> Calibration:
    """Raises TypeError, KeyError or ValueError where the file is not what `_keep` wrote."""
    found = Calibration(**{**content, "rates": Rates(**content["rates"])})
    rates = found.rates
    figures = [
        *rates.matrix.values(), *rates.attention.values(), rates.bandwidth, rates.operation_seconds,
        rates.disk_read, rates.decoding, found.start_seconds, found.idle_bytes,
    ]  # fmt: skip
    if not rates.matrix or not all(isinstance(each, int | float) and 0 < each < 1e18 for each in figures):
        raise ValueError("not the rates of a machine")
    return found


def _keep(path: Path, measured: Calibration) -> None:
    try:
        write_atomic(path, json_text(asdict(measured)))
    except (OSError, StorageError):
        say(f"       The figures cannot be kept in {path.parent}; they are measured anew next time.")


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
