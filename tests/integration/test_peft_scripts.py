"""Eight scripts as users of PEFT write them: with the import line changed, they print the same numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "peft_scripts"
IMPORT = re.compile(r"^from peft import ", flags=re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|\b\d+\b")
RELATIVE, ABSOLUTE = 1e-4, 2e-6
"""Two ways of adding the same numbers; the second is the last digit that the scripts print."""

NAMES = (
    "lora_causal",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "lora_sequence_classification",
            "qlora_preparation",
            "qlora_bitsandbytes",
            "ia3_seq2seq",
            "prefix_seq2seq",
            "prompt_causal",
            "load_and_merge",
        )
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_prints_the_same_after_changing_its_import(name: str, shared: Path, tmp_path: Path) -> None:
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    assert len(IMPORT.findall(text)) == 1
    changed = IMPORT.sub("from graftlm.integrations.peft_api import ", text)
    theirs, ours = (
        run(code, tmp_path / f"with_{which}.py", shared)
        for which, code in (("peft", text), ("graft", changed))
    )
    assert len(theirs) >= 15
    assert len(theirs) == len(ours)
    for expected, found in zip(theirs, ours, strict=True):
        assert NUMBER.sub("#", found) == NUMBER.sub("#", expected)
        assert numbers(found) == pytest.approx(numbers(expected), rel=RELATIVE, abs=ABSOLUTE), found


def test_every_script_is_run() -> None:
    names = [value if isinstance(value, str) else value.values[0] for value in NAMES]
    assert sorted(names) == sorted(path.stem for path in SCRIPTS.glob("*.py"))


def run(code: str, script: Path, shared: Path) -> list[str]:
    """The lines that a script prints; those that report speed are left out."""
    script.write_text(code, encoding="utf-8")
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {
        **os.environ,
        "GRAFT_SHARED": str(shared),
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, script], cwd=script.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.strip() and "runtime" not in line]


def numbers(line: str) -> list[float]:
    return [float(text) for text in NUMBER.findall(line)]
