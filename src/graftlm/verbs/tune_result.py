"""What a finished run says: lines for people, figures for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.evaluation.compare import Comparison
from graftlm.evaluation.measure_change import measured
from graftlm.evaluation.measure_figures import compared, ends
from graftlm.evaluation.measure_text import headline
from graftlm.tasks.dataset import Dataset, Row
from graftlm.tasks.measurement import Measurement
from graftlm.training.loop import TrainResult
from graftlm.verbs.plan import Plan
from graftlm.verbs.proof import Proof
from graftlm.verbs.run_folder import PLAN, RunFolder


@dataclass(frozen=True)
class TuneResult:
    """What a run left behind and what it says."""

    run: Path
    adapter: Path
    report: Path
    verdict: str
    passed: bool
    lines: tuple[str, ...]
    figures: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        paths = {"run": str(self.run), "adapter": str(self.adapter), "report": str(self.report)}
        return {**paths, "verdict": self.verdict, "passed": self.passed, **self.figures}


@dataclass(frozen=True)
class Outcome:
    """What the stages of a run found."""

    before: Measurement | None
    after: Measurement
    result: TrainResult
    proof: Proof


def lines(folder: RunFolder, dataset: Dataset[Row], plan: Plan, found: Outcome) -> tuple[str, ...]:
    """One line for each stage."""
    states = [found.before, found.after] if found.before else [found.after]
    return (
        f"Data: {len(dataset.train):,} rows, {len(dataset.held_out):,} held out -> {dataset.path}",
        f"Plan: {plan.summary} -> {folder.path / PLAN}",
        f"Train: {found.result.step:,} steps, {found.result.seconds:.0f} s, "
        f"{found.result.peak_memory_bytes / 2**30:.2f} GiB -> {folder.events}",
        f"Evaluate: {headline(*(state.held_out for state in states))} -> {folder.report}",
        f"Verify: {found.proof.summary} -> {folder.adapter}",
    )


def figures(found: Outcome, comparison: Comparison | None) -> dict[str, Any]:
    """The same for machines."""
    alone = {name: {"after": ends(one)} for name, one in measured(found.after.held_out).items()}
    return {
        "steps": found.result.step,
        "seconds": found.result.seconds,
        "peak_memory_bytes": found.result.peak_memory_bytes,
        "before": _figures_of(found.before) if found.before else None,
        "after": _figures_of(found.after),
        "measures": compared(comparison) if comparison else alone,
        "merge": found.proof.merge.as_dict() if found.proof.merge else None,
    }


def _figures_of(one: Measurement) -> dict[str, Any]:
    match = one.held_out.exact_match
    return {
        "held_out_loss": one.held_out.loss,
        "known_text_loss": one.known.loss if one.known else None,
        "exact_match": match.interval.value if match else None,
        "held_out_rows": len(one.held_out.rows),
    }
