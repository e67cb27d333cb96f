"""Twelve written scenarios: the pages beside them say what Graft chooses, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario import page, scenarios


def test_every_scenario_has_its_page() -> None:
    assert len(scenarios()) == 12
    for path in scenarios():
        text = path.with_suffix(".md").read_text(encoding="utf-8")
        assert "## The recipe" in text or "**Nothing fits.**" in text


QUICK = ("01-laptop-cpu", "02-12gb-1b", "11-80-examples")
"""Bases that are rehearsed in seconds; all twelve take a quarter of an hour."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in scenarios() if path.stem in QUICK], ids=lambda path: path.stem
)
def test_the_page_is_what_is_chosen(path: Path) -> None:
    """`python tests/planning/scenario.py` writes them anew."""
    assert page(path) == path.with_suffix(".md").read_text(encoding="utf-8")
