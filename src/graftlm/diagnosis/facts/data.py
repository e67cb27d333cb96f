"""Facts from the rows as they were encoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataFacts:
    """Facts from the rows as they were encoded; a field is None where it was not looked at."""
