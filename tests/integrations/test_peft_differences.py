"""The cases of docs/results/peft-differences.md: Graft is right, and PEFT gives what is written there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/results/peft-differences.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([^|]+?) \| ([\d.]+) \| ([\d.]+) \|", flags=re.MULTILINE)
WRITTEN = {name: (float(theirs), float(ours)) for name, theirs, ours in ROW.findall(PAGE)}
ROUNDING = 1e-5
"""What float32 leaves of a figure that is 0."""


def load() -> ModuleType:
    path = ROOT / "benchmarks/peft_differences.py"
    spec = importlib.util.spec_from_file_location("peft_differences", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


differences = load()


@pytest.mark.parametrize("name", differences.CASES)
def test_graft_is_right(name: str) -> None:
    found = differences.measure(name)
    theirs, ours = WRITTEN[name]
    assert found.graft == pytest.approx(ours, rel=0.02, abs=ROUNDING)
    if peft.__version__ == "0.21.2":
        assert found.peft == pytest.approx(theirs, rel=0.1)


def test_every_case_is_described() -> None:
    assert WRITTEN.keys() == differences.CASES.keys()
