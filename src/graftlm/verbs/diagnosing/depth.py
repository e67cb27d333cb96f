"""What `--deep` looks at besides the adapter itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graftlm.core.errors import UsageError


@dataclass(frozen=True)
class Depth:
    """Further things to compare with, each as somebody named it."""

    adapter: Path | None = None
    """The run or adapter that a merged model was made of, where its files do not say."""
    beside: tuple[Path, ...] = ()
    """Runs or adapters that are served together with this one."""
    served: str | None = None
    """Address of the server that serves them; without it a routed batch is asked."""
    safety: Path | None = None
    """Prompts with a `label`, safe or unsafe."""
    known: Path | None = None
    """Text that the base should still know."""


def depth_of(
    adapter: str | Path | None,
    beside: Sequence[str | Path],
    served: str | None,
    safety: str | Path | None,
    known: str | Path | None,
) -> Depth:
    """From what somebody wrote.

    Raises:
        UsageError: a path where nothing is, or a server without a second adapter.
    """
    named = [path for path in (adapter, *beside, safety, known) if path is not None]
    if missing := [str(path) for path in named if not Path(path).exists()]:
        raise UsageError(  # said here, before a base is loaded
            f"There is no {' and no '.join(missing)}.", fix="Check the path."
        )
    one = [None if path is None else Path(path) for path in (adapter, safety, known)]
    if served is not None and not beside:
        raise UsageError(
            "A server was named, and no adapter beside this one.",
            meaning="Whether adapters are mixed up shows where there are two of them at least.",
            fix="Name the others that it serves: --beside RUN.",
        )
    return Depth(one[0], tuple(map(Path, beside)), served, one[1], one[2])
