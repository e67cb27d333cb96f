"""Results files: CSV that only ever grows, every row with machine, versions, command and date."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")
STARTED = datetime.now(UTC)
FOLDER = Path(__file__).resolve().parents[1] / "results"
BENCHMARKS = FOLDER.parent


def today() -> str:
    """The date, as results files have it."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def versions(*packages: str) -> str:
    """Installed versions; packages that are not there are left out.

    >>> versions("torch", "no-such-package").startswith("torch ")
    True
    """
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def machine(*, threads: int | None = None) -> str:
    """Processor and cores, or the threads that were in use."""
    what = f"{threads} threads" if threads else f"{os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {what}"


def described_machine() -> str:
    """GPUs, or processor, cores, what it computes 16-bit numbers with, and memory."""
    from graftlm.core.environment import describe_environment

    found = describe_environment()
    if found.gpus:
        return ", ".join(gpu.name for gpu in found.gpus)
    sets = "/".join(name for name in found.instruction_sets if "BF16" in name) or "no 16-bit arithmetic"
    return f"{found.cpu}, {found.cores} cores, {sets}, {found.memory_bytes / 2**30:.0f} GiB"


def command(script: str | Path) -> str:
    """How this run was started, as a person types it in the repository."""
    path = Path(script).resolve().relative_to(BENCHMARKS.parent)
    return shlex.join(["python", path.as_posix(), *sys.argv[1:]])


def where(script: str | Path, *packages: str) -> dict[str, str]:
    """Machine, versions, command and time (UTC, of the start) of this run."""
    return {
        "machine": described_machine(),
        "versions": versions(*packages),
        "command": command(script),
        "date": STARTED.strftime("%Y-%m-%d %H:%M"),
    }


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows of the same columns; a new file gets a header.

    Raises:
        SystemExit: the file has other columns; nothing is written.
    """
    if not rows:
        return
    names = list(rows[0])
    path.parent.mkdir(exist_ok=True)
    if path.is_file() and header(path) != names:
        raise SystemExit(
            f"{path.name} has other columns: {', '.join(sorted(set(header(path)) ^ set(names)))}"
        )
    is_new = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def header(path: Path) -> list[str]:
    """Names of the columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def read(path: Path) -> list[dict[str, str]]:
    """All rows; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_as(kind: type[R], path: Path) -> list[R]:
    """All rows as instances of a dataclass whose fields are numbers, optional numbers and texts."""
    kinds = {item.name: str(item.type) for item in fields(kind)}  # type: ignore[arg-type]
    return [kind(**{name: _parsed(kinds[name], text) for name, text in row.items()}) for row in read(path)]


def _parsed(kind: str, text: str) -> Any:
    if kind.endswith("| None"):
        return float(text) if text else None
    return {"int": int, "float": float}.get(kind, str)(text)


def joined(values: Sequence[float]) -> str:
    """A list in one cell."""
    return " ".join(f"{value:.6g}" for value in values)
