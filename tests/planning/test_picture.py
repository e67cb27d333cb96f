"""The picture of a choice: whole, to scale, safe to open, in every format."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from test_choice import plan

from graftlm.core.errors import UsageError
from graftlm.planning.drawing import svg
from graftlm.planning.picture import require_ending, stacks, write_picture

NAMESPACE = "{http://www.w3.org/2000/svg}"


def test_stacks_are_to_scale_and_named() -> None:
    choice = plan(8)
    options = choice.options[:4]
    root = ElementTree.fromstring(svg(stacks(choice, options, "<b>& title")))
    words = [element.text or "" for element in root.iter(f"{NAMESPACE}text")]
    assert "<b>& title" in words and {option.label for option in options} <= {*words}
    line = next(root.iter(f"{NAMESPACE}line"))
    per_byte = (float(line.attrib["x1"]) - 170) / choice.machine.memory_bytes
    for option in options:
        widths = [
            float(bar.attrib["width"])
            for bar in root.iter(f"{NAMESPACE}rect")
            if (bar.findtext(f"{NAMESPACE}title") or "").startswith(f"{option.label}, ")
        ]
        assert sum(widths) == pytest.approx(per_byte * option.fit.memory.peak, abs=0.5)


@pytest.mark.parametrize("ending", [".svg", ".html", ".png"])
def test_every_format_is_written(ending: str, tmp_path: Path) -> None:
    if ending == ".png":
        pytest.importorskip("PIL")
    choice, path = plan(8), tmp_path / f"memory{ending}"
    require_ending(path)
    write_picture(path, choice, choice.options, "sprout")
    content = path.read_bytes()
    assert content.startswith({".svg": b"<svg", ".html": b"<!doctype", ".png": b"\x89PNG"}[ending])
    if ending != ".png":
        assert b"<script" not in content and not re.search(rb"(?:src|href)=", content)


def test_another_ending_is_refused() -> None:
    with pytest.raises(UsageError, match="no picture"):
        require_ending(Path("x.gif"))
