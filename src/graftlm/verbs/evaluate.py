"""`graft eval`: an adapter on data it has not seen, against its base or another adapter, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.core.progress import progress
from graftlm.evaluation.compare import Comparison, compare
from graftlm.evaluation.measure_figures import compared
from graftlm.evaluation.measure_text import shown
from graftlm.evaluation.runner import Evaluation
from graftlm.evaluation.verdict import Verdict, verdict
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.models.generate import context_length
from graftlm.tasks.labels import task_of_adapter
from graftlm.tasks.table import task_of
from graftlm.training.defaults import fitted_length
from graftlm.training.parts import parts_of
from graftlm.training.recipe import DataSection, Recipe
from graftlm.verbs.base import load_base, section_of, stored_recipe
from graftlm.verbs.references import Reference, adapter_reference

ADAPTER, OTHER = "adapter", "other"


@dataclass(frozen=True)
class EvalResult:
    """Two models on the same rows."""

    comparison: Comparison
    judged: Verdict
    data: str

    @property
    def verdict(self) -> str:
        return self.judged.text

    @property
    def passed(self) -> bool:
        """The adapter is not worse than what it was compared with."""
        return self.judged.outcome != "FAIL"

    @property
    def lines(self) -> tuple[str, ...]:
        found, loss, match = self.comparison, self.comparison.loss, self.comparison.exact_match
        rows = [
            f"{change.title}: {found.before} {shown(change.before.value, change.unit)}, {found.after} "
            f"{shown(change.after.value, change.unit)} on {change.rows:,} rows -> {self.data}"
            for change in found.measures
        ]
        if found.loss_title:
            rows.append(
                f"Loss: {found.before} {loss.before.value:.4f}, {found.after} {loss.after.value:.4f} "
                f"on {loss.rows:,} rows -> {self.data}"
            )
        if match is None or found.labels is not None:
            return tuple(rows)
        before, after = 100 * match.before.interval.value, 100 * match.after.interval.value
        counts = f"{match.gained} gained, {match.lost} lost"
        return (*rows, f"Exact match: {before:.1f} % to {after:.1f} % ({counts})")

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        loss, match = self.comparison.loss, self.comparison.exact_match
        answers = match and {
            "before": match.before.interval.value,
            "after": match.after.interval.value,
            "p_value": match.p_value,
        }
        return {
            "data": self.data,
            "rows": loss.rows,
            "loss": {
                "before": loss.before.value,
                "after": loss.after.value,
                "difference": [loss.difference.value, loss.difference.low, loss.difference.high],
            },
            "exact_match": answers,
            "measures": compared(self.comparison),
            "outcome": self.judged.outcome,
            "verdict": self.verdict,
            "passed": self.passed,
        }


def evaluate(
    adapter: str | Path, *, data: str | Path, against: str | Path | None = None, base: str | None = None,
    limit: int | None = None,
) -> EvalResult:  # fmt: skip
    """Measure an adapter on `data`, paired by row with its base or with the adapter `against`.

    Raises:
        GraftError: in three parts.
    """
    reference = adapter_reference(str(adapter), base)
    recipe = recipe_on(reference, str(data))
    task = task_of(recipe)
    task.read_held_out(limit)
    model, tokenizer = load_base(recipe.model, reference.base, ending=task.ending)
    task.require_base(model)
    adapters = attach_folder(model, reference.adapter, ADAPTER, storage=FOLDER)
    task.recipe = fitted_length(task.recipe, context_length(model))
    task.encode(tokenizer)
    names: list[str] = []
    if against is not None:
        adapters.load(adapter_reference(str(against), reference.base).adapter, OTHER)
        names = [OTHER]
    found: list[Evaluation] = []
    for active, label in ((names, str(against or "base")), ([ADAPTER], str(adapter))):
        with adapters.activated(active), progress(f"measuring {label}") as tick:
            found.append(task.measure(model, tokenizer, name=label, progress=tick, stop=lambda: False))
    comparison = compare(*found)
    return EvalResult(comparison, verdict(comparison), str(data))


def recipe_on(reference: Reference, data: str) -> Recipe:
    """The settings the adapter was trained with where its run is known, on other data."""
    if reference.run is None:
        recipe = Recipe(model=section_of(reference), data=DataSection(path=data))
        return recipe.model_copy(update={"task": task_of_adapter(reference.adapter) or recipe.task})
    stored = stored_recipe(reference.run)
    if reference.part is not None:
        stored = parts_of(stored)[reference.part]
    # Columns that were named stay named; otherwise the file's own shape counts.
    format = stored.data.format if "(" in stored.data.format else "auto"
    section = stored.data.model_copy(update={"path": data, "eval_path": None, "format": format})
    return stored.model_copy(update={"data": section})
