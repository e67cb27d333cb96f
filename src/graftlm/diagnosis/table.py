"""Every rule by its id."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule

RULES: dict[str, Rule] = {}


def diagnose(evidence: Evidence, rules: Sequence[Rule] | None = None) -> list[Finding]:
    """What applies, the surest and worst first."""
    order = {"error": 0, "warning": 1, "note": 2}
    asked = RULES.values() if rules is None else rules
    found = [finding for rule in asked if (finding := rule.check(evidence)) is not None]
    return sorted(found, key=lambda finding: (order[finding.severity], -finding.confidence, finding.rule))
