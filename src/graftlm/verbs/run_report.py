"""The content of a run's report, collected from what its stages left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from graftlm.core.config import dump_yaml
from graftlm.core.environment import describe_environment
from graftlm.evaluation.compare import Comparison, Forgetting
from graftlm.evaluation.report_data import (
    DataFacts,
    Fact,
    MergeCheck,
    NextStep,
    Notice,
    Predictions,
    ReportData,
    Sheet,
    TrainingFacts,
    curves_from_events,
)
from graftlm.evaluation.verdict import Verdict
from graftlm.tasks.base import Task
from graftlm.tasks.dataset import Dataset, Row
from graftlm.training.loop import TrainResult
from graftlm.training.memory_phases import MemoryPhases
from graftlm.training.recipe import Recipe
from graftlm.verbs.memory_report import memory_facts
from graftlm.verbs.plan import Plan
from graftlm.verbs.proof import Proof
from graftlm.verbs.run_folder import RunFolder


def report_data(
    *,
    recipe: Recipe,
    task: Task[Any],
    plan: Plan,
    result: TrainResult,
    proof: Proof,
    comparison: Comparison | None,
    known: Forgetting | None,
    judged: Verdict | None,
    folder: RunFolder,
    events: Sequence[Mapping[str, Any]],
    notices: Sequence[str],
    memory: MemoryPhases,
    predictions: Predictions | None,
) -> ReportData:
    """Everything that `report.html` shows of a finished run."""
    logged = (str(event["text"]) for event in events if event["kind"] == "notice")
    said = [*filter(None, [proof.why_unmerged]), *notices, *logged]
    return ReportData(
        title=f"{folder.path.resolve().name}: {plan.method} on {recipe.model.name}",
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdict=judged,
        notices=tuple(Notice(text) for text in dict.fromkeys(said)),
        comparison=comparison,
        forgetting=known,
        curves=curves_from_events(events),
        training=_training(plan, recipe, result, events),
        memory=memory_facts(events, memory),
        predictions=predictions,
        merge=_merge(proof, plan),
        data=_data(recipe, task.dataset),
        sheets=_sheets(task),
        next_steps=_next_steps(folder),
        recipe_yaml=dump_yaml(recipe),
        environment=_environment(),
    )


def _training(
    plan: Plan, recipe: Recipe, result: TrainResult, events: Sequence[Mapping[str, Any]]
) -> TrainingFacts:
    # A resumed run repeats no step, but a killed one may: the last event of a step is what counts.
    steps = list({event["step"]: event for event in events if event["kind"] == "step"}.values())
    seconds = sum(float(event["seconds"]) for event in steps)
    return TrainingFacts(
        base=recipe.model.name,
        method=plan.method,
        trainable=plan.trainable,
        total=plan.total,
        sites=plan.sites,
        dtype=plan.dtype,
        quantization=plan.quantization,
        device=plan.device,
        steps=result.step,
        epochs=float(steps[-1]["epoch"]) if steps else None,
        seconds=seconds,
        target_tokens=sum(int(event["target_tokens"]) for event in steps),
        tokens_per_second=sum(int(event["real_tokens"]) for event in steps) / seconds if seconds else None,
        peak_memory_bytes=result.peak_memory_bytes,
    )


def _merge(proof: Proof, plan: Plan) -> MergeCheck | None:
    figures = proof.merge
    if figures is None:
        return None
    reload = "bit-equal" if proof.is_reload_exact else "NOT equal"
    unmerge = "exact" if proof.is_unmerge_exact else "NOT exact"
    return MergeCheck(
        probes=figures.probes,
        mean_kl=figures.mean_kl,
        top1_agreement=figures.top1,
        dtype=plan.dtype,
        passed=proof.is_good,
        largest_logit_difference=figures.largest_logit_difference,
        note=f"Merged into {proof.merged_into}. The saved adapter, read back, is {reload}; unmerging the "
        f"base is {unmerge}.",
    )


def _data(recipe: Recipe, dataset: Dataset[Row]) -> DataFacts:
    lengths = sorted(row.tokens for row in dataset.train)
    return DataFacts(
        path=recipe.data.path,
        format=f"{dataset.format.name} ({dataset.format.why})",
        train_rows=len(dataset.train),
        held_out_rows=len(dataset.held_out),
        train_tokens=dataset.train_tokens,
        target_share=dataset.target_share,
        median_tokens=lengths[len(lengths) // 2],
        longest_tokens=lengths[-1],
        truncated_rows=dataset.truncated,
        duplicate_rows=dataset.duplicates,
    )


def _sheets(task: Task[Any]) -> tuple[Sheet, ...]:
    facts = tuple(Fact(name, value) for name, value in task.facts)
    return (Sheet(f"The task: {task.name}", facts),) if facts else ()


def _next_steps(folder: RunFolder) -> tuple[NextStep, ...]:
    run = folder.path
    return (
        NextStep("Talk to it", f"graft chat {run}"),
        NextStep("Measure it on other data", f"graft eval {run} --data FILE"),
        NextStep("Make one dense model of base and adapter", f"graft merge {run} --out {run}-merged"),
    )


def _environment() -> tuple[Fact, ...]:
    found = describe_environment()
    plain = tuple(
        Fact(key, str(value))
        for key, value in found.as_dict().items()
        if isinstance(value, str | int | float)
    )
    return (*plain, Fact("fast paths", ", ".join(path.name for path in found.fast_paths if path.on)))
