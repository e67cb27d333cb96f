"""One tuned run for all tests of verbs, and the ways to start a verb: in this process or in its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests here share one module

from runs import SETTINGS, Outcome, write_rows

from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult


@pytest.fixture(scope="session", autouse=True)
def _importable(repository: Path) -> None:
    """Processes that a verb starts must find the package as this one does."""
    os.environ["PYTHONPATH"] = str(repository / "src")


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """`python -m graftlm ...` in a process of its own."""
    home = tmp_path_factory.mktemp("home")

    def start(*arguments: str | Path, cwd: Path | None = None) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "graftlm", *map(str, arguments)],
            capture_output=True, text=True, cwd=cwd or home, check=False, timeout=300,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data file."""
    rows = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(90)]
    return write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", rows)


@pytest.fixture(scope="session")
def tuned(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """A finished run on the embedded base, in float32. Nobody may change its folder."""
    return tune(sums, model="sprout", out=tmp_path_factory.mktemp("runs") / "tuned", overrides=SETTINGS)
