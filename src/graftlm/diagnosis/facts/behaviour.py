"""Facts from running base and adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BehaviourFacts:
    """Facts from running base and adapter; a field is None where it was not looked at."""
