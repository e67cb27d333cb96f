"""Every rule by its id."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.rules import (
    adapter_identity,
    begin_token,
    end_token,
    evaluation_mode,
    finite,
    forgetting,
    gradients,
    leaks,
    learning_rate,
    masks,
    memory,
    merging,
    missing_head,
    mlp_targets,
    optimizer_weights,
    overfitting,
    policies,
    preferences,
    rank,
    safety,
    saved_head,
    serving,
    template,
    tied_embeddings,
    truncation,
    untrained_adapter,
    update_size,
    virtual_tokens,
)

_ALL: tuple[Rule, ...] = (
    adapter_identity.RULE,
    begin_token.RULE,
    end_token.RULE,
    evaluation_mode.RULE,
    finite.OVERFLOW,
    finite.RULE,
    forgetting.RULE,
    gradients.RULE,
    leaks.RULE,
    learning_rate.RULE,
    masks.RULE,
    memory.RULE,
    merging.RULE,
    missing_head.RULE,
    mlp_targets.RULE,
    optimizer_weights.RULE,
    overfitting.RULE,
    policies.RULE,
    preferences.RULE,
    rank.TOO_HIGH,
    rank.TOO_LOW,
    safety.RULE,
    saved_head.RULE,
    serving.RULE,
    template.RULE,
    tied_embeddings.RULE,
    truncation.RULE,
    untrained_adapter.RULE,
    update_size.RULE,
    virtual_tokens.RULE,
)

RULES: dict[str, Rule] = {rule.id: rule for rule in sorted(_ALL, key=lambda rule: rule.id)}


def diagnose(evidence: Evidence, rules: Sequence[Rule] | None = None) -> list[Finding]:
    """What applies, the surest and worst first."""
    order = {"error": 0, "warning": 1, "note": 2}
    asked = RULES.values() if rules is None else rules
    found = [finding for rule in asked if (finding := rule.check(evidence)) is not None]
    return sorted(found, key=lambda finding: (order[finding.severity], -finding.confidence, finding.rule))
