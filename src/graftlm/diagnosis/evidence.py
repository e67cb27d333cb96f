"""What rules look at: facts of a run as plain Python, each None where nobody gathered it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftlm.diagnosis.facts.adapter import AdapterFacts
from graftlm.diagnosis.facts.behaviour import BehaviourFacts
from graftlm.diagnosis.facts.data import DataFacts
from graftlm.diagnosis.facts.structure import StructureFacts


@dataclass(frozen=True)
class Evidence:
    """Everything that is known of a run, at its start, while it goes, or afterwards."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    """`recipe.yaml`, complete and effective."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """`plan.json`."""
    events: Sequence[Mapping[str, Any]] = ()
    """`events.jsonl` so far, without what a resume repeated."""
    report: Mapping[str, Any] | None = None
    """`report.json`, of a finished run."""
    data: DataFacts | None = None
    adapter: AdapterFacts | None = None
    behaviour: BehaviourFacts | None = None
    structure: StructureFacts | None = None
    is_over: bool = False
    """Whether the run has ended: some rules judge trends only then."""

    @property
    def method(self) -> str:
        """`lora`, `prefix` ..."""
        found = self.recipe.get("method")
        return str(found.get("type", "")) if isinstance(found, Mapping) else str(found or "")

    @property
    def task(self) -> str:
        """`sft`, `dpo` ..."""
        found = self.recipe.get("task", "")
        return str(found.get("type", "")) if isinstance(found, Mapping) else str(found)

    def series(self, kind: str, field_name: str) -> tuple[tuple[float, float], ...]:
        """(step, value) of the events of a kind; a metric is named as `metrics.NAME`.

        >>> log = [{"kind": "step", "step": 3, "metrics": {"kl": 0.5}}]
        >>> Evidence(events=log).series("step", "metrics.kl")
        ((3.0, 0.5),)
        """
        outer, _, inner = field_name.partition(".")
        found = {}
        for event in self.events:
            value = event.get(outer)
            value = value.get(inner) if inner and isinstance(value, Mapping) else value
            if event.get("kind") == kind and isinstance(value, int | float):
                found[float(event["step"])] = float(value)
        return tuple(sorted(found.items()))
