"""Starting is fast because it loads little: `import graftlm` and `graft --help` never see torch."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy", "pandas", "pyarrow")

BARE = """
import typer
app = typer.Typer()
@app.command()
def first(a: int = 1): ...
@app.command()
def second(b: int = 2): ...
app(["--help"])
"""
HELP = "from graftlm.cli.main import run; run(['--help'])"


def loaded_by(code: str, modules: tuple[str, ...]) -> str:
    """Which of `modules` a fresh Python has loaded after `code`."""
    tail = f"\nimport sys\nprint('LOADED', [name for name in {modules!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, env=environment()
    )
    return done.stdout.rpartition("LOADED ")[2].strip()


def environment() -> dict[str, str]:
    source = str(Path(__file__).resolve().parents[1] / "src")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def test_import_graftlm_is_light() -> None:
    assert loaded_by("import graftlm", HEAVY) == "[]"


def test_help_is_light() -> None:
    assert loaded_by(HELP, (*HEAVY, "pydantic", "yaml")) == "[]"


@pytest.mark.parametrize("folder", ["core", "cli"])
def test_no_module_of_the_border_loads_torch(folder: str, repository: Path) -> None:
    files = sorted((repository / "src" / "graftlm" / folder).glob("*.py"))
    imports = "\n".join(f"import graftlm.{folder}.{file.stem}" for file in files if file.stem != "__init__")
    assert loaded_by(imports, HEAVY) == "[]"


def test_help_costs_little_more_than_typer_itself() -> None:
    """0.4 s at most is what an idle machine shows; this bound holds on a busy one too."""
    assert best_seconds(HELP) < 2 * best_seconds(BARE) + 0.3


def best_seconds(code: str) -> float:
    """Processor seconds of the cheapest of five fresh processes."""
    return min(processor_seconds(code) for _ in range(5))


def processor_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
