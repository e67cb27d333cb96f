"""What a report can say: a tree of frozen dataclasses, every section optional.

`report.json` is this tree as JSON; `report.html` shows it. A section that is None (or empty) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftlm.diagnosis.finding import Finding
from graftlm.evaluation.compare import Comparison, Forgetting
from graftlm.evaluation.verdict import Verdict

Points = tuple[tuple[float, float], ...]
"""(step, value) pairs in order of step."""


@dataclass(frozen=True)
class MetricCurve:
    """One figure of the task over the steps: in training batches and on held-out rows."""

    name: str
    training: Points = ()
    held_out: Points = ()


@dataclass(frozen=True)
class Curves:
    """A run over its optimizer steps; `skipped` counts steps that were refused (not finite)."""

    loss: Points = ()
    held_out: Points = ()
    learning_rate: Points = ()
    grad_norm: Points = ()
    tokens_per_second: Points = ()
    skipped: int = 0
    metrics: tuple[MetricCurve, ...] = ()


@dataclass(frozen=True)
class SiteGroup:
    """Modules of one role that were adapted, for instance 28 x `q_proj`; `shape` as a person reads it."""

    modules: str
    count: int
    shape: str
    trainable: int


@dataclass(frozen=True)
class TrainingFacts:
    """What was trained, on what, and what it took. Unknown figures are None."""

    base: str
    method: str
    trainable: int
    total: int
    sites: tuple[SiteGroup, ...] = ()
    dtype: str | None = None
    quantization: str | None = None
    device: str | None = None
    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    target_tokens: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class MemoryClass:
    """Tensors of one kind in memory, and the parameters that they stand for."""

    name: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class MemoryPeak:
    """The most memory in one phase of a run: of the process, and of its GPU where there is one."""

    phase: str
    resident: int
    allocated: int | None = None
    reserved: int | None = None


@dataclass(frozen=True)
class MemoryFacts:
    """Where the memory of a run went. Without `is_exact` a phase shows the highest peak up to its end."""

    classes: tuple[MemoryClass, ...]
    peaks: tuple[MemoryPeak, ...]
    is_exact: bool = True


@dataclass(frozen=True)
class PredictedFigure:
    """Bytes or seconds as predicted before the first step, and as they were; None where nobody measured."""

    name: str
    predicted: float
    actual: float | None = None


@dataclass(frozen=True)
class Predictions:
    """What was predicted of a run: peaks in bytes by phase, seconds by part."""

    peaks: tuple[PredictedFigure, ...]
    times: tuple[PredictedFigure, ...]
    note: str = ""


@dataclass(frozen=True)
class MergeCheck:
    """The merged model against base + adapter on `probes` inputs; KL in nats per token."""

    probes: int
    mean_kl: float
    top1_agreement: float
    dtype: str
    passed: bool
    largest_logit_difference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class DataFacts:
    """The training data as it went in."""

    path: str
    format: str
    train_rows: int
    held_out_rows: int | None = None
    train_tokens: int | None = None
    target_share: float | None = None
    median_tokens: int | None = None
    longest_tokens: int | None = None
    truncated_rows: int | None = None
    duplicate_rows: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Notice:
    """Something a reader should know; `fix` is the command or edit that changes it."""

    text: str
    severity: Literal["warning", "note"] = "note"
    fix: str = ""


@dataclass(frozen=True)
class Fact:
    """One line of a table of facts."""

    name: str
    value: str


@dataclass(frozen=True)
class Sheet:
    """A section of facts that has no type of its own."""

    title: str
    facts: tuple[Fact, ...]
    note: str = ""


@dataclass(frozen=True)
class NextStep:
    """What one can do now, and the command that does it."""

    text: str
    command: str


@dataclass(frozen=True)
class ReportData:
    """Everything on the page, in the order in which it is shown."""

    title: str
    created: str
    verdict: Verdict | None = None
    notices: tuple[Notice, ...] = ()
    findings: tuple[Finding, ...] = ()
    comparison: Comparison | None = None
    forgetting: Forgetting | None = None
    curves: Curves | None = None
    training: TrainingFacts | None = None
    memory: MemoryFacts | None = None
    predictions: Predictions | None = None
    merge: MergeCheck | None = None
    data: DataFacts | None = None
    sheets: tuple[Sheet, ...] = ()
    next_steps: tuple[NextStep, ...] = ()
    recipe_yaml: str | None = None
    environment: tuple[Fact, ...] = ()


def curves_from_events(events: Sequence[Mapping[str, Any]]) -> Curves:
    """The curves of an event log. Where a resumed run repeats a step, the later event counts.

    >>> curves_from_events([{"kind": "step", "step": 1, "loss": 2.0}]).loss
    ((1.0, 2.0),)
    """
    return Curves(
        loss=_points(events, "step", "loss"),
        held_out=_points(events, "evaluate", "loss"),
        learning_rate=_points(events, "step", "learning_rate"),
        grad_norm=_points(events, "step", "grad_norm"),
        tokens_per_second=_points(events, "step", "tokens_per_second"),
        skipped=sum(event.get("kind") == "skipped" for event in events),
        metrics=_metric_curves(events),
    )


def _metric_curves(events: Sequence[Mapping[str, Any]]) -> tuple[MetricCurve, ...]:
    """In the order in which the names first appear."""
    inside = [{**event, **_metrics(event), "step": event.get("step")} for event in events]
    names = dict.fromkeys(name for event in events for name in _metrics(event))
    return tuple(
        MetricCurve(name, _points(inside, "step", name), _points(inside, "evaluate", name)) for name in names
    )


def _metrics(event: Mapping[str, Any]) -> Mapping[str, Any]:
    found = event.get("metrics")
    return found if isinstance(found, Mapping) else {}


def _points(events: Sequence[Mapping[str, Any]], kind: str, field: str) -> Points:
    found: dict[float, float] = {}
    for event in events:
        step, value = event.get("step"), event.get(field)
        if event.get("kind") == kind and isinstance(step, int | float) and isinstance(value, int | float):
            found[float(step)] = float(value)
    return tuple((step, found[step]) for step in sorted(found) if math.isfinite(found[step]))
