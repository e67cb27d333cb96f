"""The README and the reference pages say what the code does: they are run, and compared with the code."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO_DATA = ROOT / "src/graftlm/models/weights/sprout/demo.jsonl"


HOW_TOS = sorted((ROOT / "docs/how-to").glob("*.md"))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/reference/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["recipe.md", "cli.md"])
def test_reference_pages_are_what_the_code_says(page: str) -> None:
    fresh = generator().PAGES[page]().rstrip() + "\n"
    stale = (ROOT / "docs/reference" / page).read_text(encoding="utf-8")
    assert stale == fresh, "python docs/reference/generate.py"


def test_every_python_block_of_the_readme_runs(tmp_path: Path) -> None:
    assert blocks("python")
    for number, code in enumerate(blocks("python")):
        script = tmp_path / f"block{number}.py"
        script.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=clean()
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", HOW_TOS, ids=lambda page: page.stem)
def test_every_python_block_of_a_how_to_runs(page: Path, tmp_path: Path) -> None:
    """One after the other in one script: starting takes longer than most of them."""
    text = page.read_text(encoding="utf-8")
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(blocks("python", text)), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=clean())
    assert done.returncode == 0, done.stderr
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    shutil.copyfile(DEMO_DATA, tmp_path / "messages.jsonl")
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("graft ")]
    assert len(commands) >= 6
    for command in commands:
        words = [sys.executable, "-m", "graftlm", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=clean())
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_of_the_readme_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def clean() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
