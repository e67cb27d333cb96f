"""What a rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding

WHOLE = "full"
"""The method that trains every weight: what belongs into an adapter and what not is no question there."""

Check = Callable[[Evidence], Finding | None]
"""Pure: the same evidence gives the same finding. None: it does not apply, or nobody can tell yet."""


@dataclass(frozen=True)
class Rule:
    """One known failure and how it is recognised."""

    id: str
    title: str
    check: Check
    source: str
    """Where the thresholds come from: a paper, documentation, or our own runs."""
    is_live: bool = False
    """Whether it is also asked while a run goes on: then it must be cheap."""
