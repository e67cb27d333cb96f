"""Where an owner of adapters keeps them; given in from above, so that no method knows formats."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

Owner = TypeVar("Owner", contravariant=True)


class Storage(Protocol[Owner]):
    """How adapters get to disk and back."""

    def save(self, adapters: Owner, directory: Path, name: str) -> None: ...

    def load(self, adapters: Owner, directory: Path, name: str, *, strict: bool) -> None: ...
