"""Where Graft keeps for the user what it can make again: measured rates, a history of runs."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "GRAFT_CACHE"
"""Environment variable that moves the folder."""


def cache_folder(*names: str) -> Path:
    """The path of that name in the user's cache folder. Nothing is made.

    >>> cache_folder("rates.json").name
    'rates.json'
    """
    given = os.environ.get(VARIABLE, "")
    if given:
        return Path(given).expanduser().joinpath(*names)
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return (root / "graft").joinpath(*names)
