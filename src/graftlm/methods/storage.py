"""Where an `AdapterSet` keeps adapters; given in from above, so that no method knows formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from graftlm.methods.adapter_set import AdapterSet


class Storage(Protocol):
    """How adapters get to disk and back."""

    def save(self, adapters: AdapterSet, directory: Path, name: str) -> None: ...

    def load(self, adapters: AdapterSet, directory: Path, name: str, *, strict: bool) -> None: ...
