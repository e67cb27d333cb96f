"""One rule, several ways in which its failure shows: the surest is told first, the others with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot, Severity


@dataclass(frozen=True)
class Symptom:
    """One way in which a failure shows, by the fields of `Finding`."""

    severity: Severity
    confidence: float
    seen: str
    meaning: str
    fix: str
    command: str
    figures: Mapping[str, float]
    plot: Plot


Look = Callable[[Evidence], Symptom | None]


def finding_of(rule: str, title: str, looks: Iterable[Look], evidence: Evidence) -> Finding | None:
    """One finding for all symptoms that are there; meaning, fix and plot are those of the worst."""
    found = [symptom for look in looks if (symptom := look(evidence)) is not None]
    if not found:
        return None
    found.sort(key=lambda symptom: (symptom.severity != "error", -symptom.confidence))
    worst = found[0]
    figures = {name: value for symptom in reversed(found) for name, value in symptom.figures.items()}
    return Finding(
        rule,
        title,
        worst.severity,
        worst.confidence,
        " ".join(symptom.seen for symptom in found),
        worst.meaning,
        worst.fix,
        worst.command,
        figures,
        worst.plot,
    )


def learning_rate(evidence: Evidence, factor: float) -> str:
    """The run's learning rate times `factor`, as a recipe has it.

    >>> learning_rate(Evidence(recipe={"train": {"learning_rate": 3e-4}}), 0.1)
    '3.0e-05'
    """
    rate = evidence.recipe.get("train", {}).get("learning_rate")
    return f"{rate * factor:.1e}" if isinstance(rate, int | float) else "RATE"
