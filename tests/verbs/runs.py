"""What the tests of verbs share: settings of a short run, the outcome of a command, folders as bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KNOWN = Path(__file__).with_name("known.txt")
SETTINGS: tuple[str, ...] = (
    "model.dtype=float32",
    "data.max_length=64",
    "method.r=4",
    "train.max_steps=6",
    "train.save_steps=2",
    "train.eval_steps=3",
    "output.report_to=none",
    f"eval.known_path={KNOWN}",
)


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        loaded = json.loads(self.out.splitlines()[-1])
        assert isinstance(loaded, dict)
        return loaded


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def assignments(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
