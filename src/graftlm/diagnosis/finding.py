"""A failure that was recognised: what was seen, what it means, what fixes it, and a picture of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["note", "warning", "error"]
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plot:
    """The evidence of a finding as a picture: lines or bars over x, and a threshold where there is one."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Points]
    """Name -> (x, y) pairs in order of x."""
    threshold: float | None = None
    kind: Literal["lines", "bars"] = "lines"
    names: tuple[str, ...] = ()
    """Of the bars, where x is their number."""


@dataclass(frozen=True)
class Finding:
    """One rule that applies to one run."""

    rule: str
    """`D05`."""
    title: str
    severity: Severity
    confidence: float
    """0 to 1: how sure the rule is that this is what happened, by the distance from its threshold."""
    seen: str
    meaning: str
    fix: str
    """In words."""
    command: str = ""
    """One command that does it; `RUN` stands for the run's folder."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the rule compared, by name."""
    plot: Plot | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
