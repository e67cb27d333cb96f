"""Sides in processes of their own, which take turns.

Started as `python -m harness.worker <task>`; the last line of its output is the `Run` as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from harness.case import Case, parse_case
from harness.measurement import Recorder, Run
from harness.sides.registry import SIDES

BENCHMARKS = Path(__file__).resolve().parents[1]
LINES = 12
"""Of the error output that are shown when a side fails."""


def run_process(command: Sequence[str], what: str) -> str:
    """The last line that a process of this Python prints.

    Raises:
        SystemExit: it failed; with the end of its error output.
    """
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{what}\n{done.stderr[-3000:]}")
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""


def environment() -> dict[str, str]:
    """Of a worker: it finds this package, and asks no server."""
    paths = [str(BENCHMARKS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_side(case: Case, side: str, number: int, folder: Path, limit: float | None = None) -> Run:
    """One round of one side. A side that is not installed, fails or takes too long says so in `failed`."""
    missing = [package for package in SIDES[side].packages if find_spec(package) is None]
    if missing:
        return Run(side, number, failed=f"not installed: {', '.join(missing)}")
    command = [sys.executable, "-m", "harness.worker", case.dumps(), side, str(number), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=limit)
    except subprocess.TimeoutExpired:
        return Run(side, number, failed=f"took longer than {limit:.0f} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        print("\n".join(lines[-LINES:]), file=sys.stderr)
        return Run(side, number, failed=reason(lines) or f"ended with {done.returncode}")
    return Run(**json.loads(done.stdout.strip().splitlines()[-1]))


def reason(lines: Sequence[str]) -> str:
    """The line of an error output that names the error; else the last one.

    >>> reason(["Traceback", "ValueError: no such side", "fix: choose another"])
    'ValueError: no such side'
    """
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit|Dependency)\b", line)]
    return ([*lines[-1:], *named] or [""])[-1][:200]


def work(case: Case, side: str, number: int, folder: Path) -> Run:
    """A side in this process."""
    run = Run(side, number, warm_up=case.warm_up)
    recorder = Recorder(run, case.device)
    train_side(case, side, folder, recorder)
    recorder.end()
    return run


def train_side(case: Case, side: str, folder: Path, recorder: Recorder) -> None:
    """All steps of a side, told to `recorder`."""
    module = importlib.import_module(f"harness.sides.{SIDES[side].module}")
    module.train(case, frozenset(SIDES[side].ways), folder, recorder)


if __name__ == "__main__":
    _, given_case, given_side, given_round, given_folder = sys.argv
    result = work(parse_case(given_case), given_side, int(given_round), Path(given_folder))
    print(json.dumps(asdict(result)))
