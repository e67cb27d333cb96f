"""The code on the page for people who come from PEFT runs as it stands, one block after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from graftlm.integrations import peft_api

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/how-to"
PAGE = (FOLDER / "from-peft.md").read_text(encoding="utf-8")


def test_every_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_every_name_is_on_the_page() -> None:
    siblings = {name for name in peft_api.__all__ if name.startswith(("PeftModelFor", "AutoPeftModel"))}
    missing = [name for name in peft_api.__all__ if f"`{name}`" not in PAGE and name not in siblings]
    assert missing == ["PromptLearningConfig"]


def test_links_lead_somewhere() -> None:
    for page in (FOLDER / "from-peft.md", ROOT / "docs/results/peft-differences.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), link
