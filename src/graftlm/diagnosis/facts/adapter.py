"""Facts from the trained tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterFacts:
    """Facts from the trained tensors; a field is None where it was not looked at."""
