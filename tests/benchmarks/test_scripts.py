"""Every benchmark script in its smallest form: figures of such runs mean nothing, that they run does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GPU = sorted(path.name for path in (BENCHMARKS / "gpu").glob("*.py"))
SMALL = ("--shape", "tiny", "--steps", "3")


def output(*arguments: str, shared: Path | None = None) -> str:
    where = {**os.environ, "GRAFT_SHARED": str(shared)} if shared else None
    command = [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=where)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("script", GPU)
def test_gpu_scripts_say_what_they_do(script: str) -> None:
    assert "--smoke" in output(f"gpu/{script}", "--help")


@pytest.mark.slow
def test_tuning() -> None:
    shown = output("tuning.py", "--rows", "lora-512", "--sides", "PEFT", "--rounds", "1", *SMALL)
    assert "| Graft |" in shown and "VOID" not in shown and "not run" not in shown


@pytest.mark.slow
def test_tuning_on_real_examples(shared: Path) -> None:
    shown = output(
        "tuning.py", "--rows", "instructions", "--sides", "TRL", "--rounds", "1", *SMALL, shared=shared
    )
    assert "| TRL |" in shown and "VOID" not in shown


@pytest.mark.slow
def test_step_profile() -> None:
    assert "| attention |" in output("step_profile.py", *SMALL)


@pytest.mark.slow
def test_levers() -> None:
    shown = output("levers.py", "--policies", "--rounds", "1", *SMALL)
    assert "| everything |" in shown and "VOID" not in shown


@pytest.mark.slow
def test_growth() -> None:
    shown = output("growth.py", "--curves", "length", "--points", "2", *SMALL)
    assert "s per TFLOP" in shown


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora_8b.py", "qlora_8b.py", "context_8b.py"])
def test_gpu_rows_on_a_tiny_model(script: str) -> None:
    shown = output(f"gpu/{script}", "--smoke")
    assert "wanted:" in shown and "VOID" not in shown
