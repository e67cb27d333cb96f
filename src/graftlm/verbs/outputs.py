"""Where verbs write: a new folder, refused before any work is done if it cannot be one."""

from __future__ import annotations

from pathlib import Path

from graftlm.core.errors import UsageError
from graftlm.core.files import require_new_directory


def require_new_output(path: Path) -> None:
    """Refuse a folder that holds something, or that cannot be made.

    Raises:
        UsageError: `path` exists with content, or lies below a file.
    """
    require_new_directory(path)
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UsageError(
            f"{path} cannot be made: {above} is a file.",
            meaning="An output is a folder, and a file holds none.",
            fix="Choose another folder.",
        )


def next_free(parent: Path, stem: str) -> Path:
    """The first of `stem-1`, `stem-2`, ... that does not exist in `parent`."""
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"
