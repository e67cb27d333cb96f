"""Every case there is."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from case import Case


def every_case() -> list[Case]:
    """Those of all modules beside this one, in order of their rules."""
    names = [path.stem for path in sorted(Path(__file__).parent.glob("*.py"))]
    modules = [import_module(f"cases.{name}") for name in names if name not in ("__init__", "collected")]
    return sorted((case for module in modules for case in module.CASES), key=str)
