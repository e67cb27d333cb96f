"""D24: what the base knew is gone."""

from __future__ import annotations

from typing import Any

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.behaviour import Change
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.symptoms import learning_rate

WARN, BLOCK = 0.10, 0.50
"""Growth of the loss on text that the base knew, as part of itself: the lower end of its interval."""


def check(evidence: Evidence) -> Finding | None:
    """The rise on known text: the one that `--deep` measured, or that of the run's own report."""
    change = (evidence.behaviour.known_loss if evidence.behaviour else None) or _of_report(evidence.report)
    if change is None or change.before <= 0:
        return None
    gate = evidence.recipe.get("eval", {}).get("max_forgetting")
    limit = float(gate) if gate else WARN
    surely = change.low / change.before
    if surely <= limit:
        return None
    rate = learning_rate(evidence, max(0.1, min(1 / 3, limit / surely)))
    return Finding(
        rule=RULE.id,
        title=RULE.title,
        severity="error" if gate or surely > BLOCK else "warning",
        confidence=confidence(surely, limit, 3 * limit),
        seen=f"On {change.items:,} texts that the base knew, the loss rose from {change.before:.3f} to "
        f"{change.after:.3f} nats per token ({100 * change.difference / change.before:+.0f} %, surely more "
        f"than {100 * surely:.0f} %).",
        meaning="The adapter took the model far from its base: what it learnt replaced what it knew.",
        fix="A smaller learning rate, fewer epochs or a smaller r; or mix some texts that the base writes "
        "itself into the training data.",
        command=f"graft tune RUN/recipe.yaml --set train.learning_rate={rate} --out RUN-gentler",
        figures={"before": change.before, "after": change.after, "surely": surely, "threshold": limit},
        plot=Plot(
            "Loss on text that the base knew",
            "",
            "nats per token",
            {"loss": ((0.0, change.before), (1.0, change.after))},
            threshold=(1 + limit) * change.before,
            kind="bars",
            names=("base", "adapter"),
        ),
    )


def _of_report(report: Any) -> Change | None:
    told = (report or {}).get("forgetting")
    if not told:
        return None
    loss = told["loss"]
    span = loss["difference"]
    return Change(loss["before"]["value"], loss["after"]["value"], span["low"], span["high"], loss["rows"])


RULE = Rule(
    "D24",
    "The base's knowledge is forgotten",
    check,
    "Replay studies (OpenReview AmQVxvyRJC); on text that the base writes itself the rise is its KL from the "
    "adapter. Our usual runs rise by 0 to 6 %.",
)
