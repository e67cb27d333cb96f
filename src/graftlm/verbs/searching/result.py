"""What a finished search says: lines for people, figures for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.evaluation.measure_text import shown
from graftlm.search.decisions import spent
from graftlm.search.trials import Trial
from graftlm.verbs.references import ADAPTER, RECIPE
from graftlm.verbs.searching.data import FINAL, SELECTION, TRAIN
from graftlm.verbs.searching.finish import Final, Outcome, chosen_text
from graftlm.verbs.searching.metric import Change, Metric
from graftlm.verbs.searching.saying import point_text
from graftlm.verbs.searching.search import Searching


@dataclass(frozen=True)
class SearchResult:
    """What a search left behind and what it says."""

    folder: Path
    recipe: Path
    adapter: Path
    report: Path
    verdict: str
    passed: bool
    """The chosen trial is better than the base on the final rows, by more than noise."""
    lines: tuple[str, ...]
    figures: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        names = ("folder", "recipe", "adapter", "report")
        paths = {name: str(getattr(self, name)) for name in names}
        return {**paths, "verdict": self.verdict, "passed": self.passed, **self.figures}


def result_of(search: Searching, found: Outcome) -> SearchResult:
    """Of a finished search."""
    folder, metric = search.folder, search.metric
    change = found.final.change
    return SearchResult(
        folder=folder.path,
        recipe=folder.path / RECIPE,
        adapter=folder.path / ADAPTER,
        report=folder.report,
        verdict=_verdict(metric, found, change),
        passed=_is_gain(metric, change),
        lines=_lines(search, found),
        figures=figures(search, found),
    )


def figures(search: Searching, found: Outcome) -> dict[str, Any]:
    """Everything, for machines."""
    used = spent(found.trials)
    return {
        "metric": search.metric.name,
        "rows": dict(search.prepared.rows),
        "trials": [_trial(search.metric, trial) for trial in found.trials],
        "front": [one.number for one in found.front],
        "best": found.best,
        "knee": found.knee,
        "chosen": found.chosen,
        "equal_within_noise": list(found.equal),
        "final": {str(one.number): _final(one) for one in found.finals},
        "importance": [
            {"name": one.name, "share": round(one.share, 4), "p_value": round(one.p_value, 4)}
            for one in found.importance
        ],
        "seconds": round(used.seconds, 1),
        "tokens": used.tokens,
    }


def _trial(metric: Metric, trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "fields": dict(trial.fields),
        "rungs": [
            {
                "step": rung.step,
                metric.name: metric.shown(rung.score.value),
                "error": round(rung.score.error, 6),
                "loss": rung.loss,
                **rung.costs,
            }
            for rung in trial.rungs
        ],
        **({"why": trial.why} if trial.why else {}),
    }


def _final(one: Final) -> dict[str, Any]:
    change = one.change
    return {
        name: [interval.value, interval.low, interval.high]
        for name, interval in (
            ("base", change.before), ("adapter", change.after), ("difference", change.difference),
        )
    }  # fmt: skip


def _is_gain(metric: Metric, change: Change) -> bool:
    return change.difference.low > 0 if metric.is_high else change.difference.high < 0


def _verdict(metric: Metric, found: Outcome, change: Change) -> str:
    before, after = (shown(one.value, metric.unit) for one in (change.before, change.after))
    fields = point_text(found.trial(found.chosen).fields)
    told = "" if _is_gain(metric, change) else "; that is no gain beyond noise"
    return (
        f"Trial {found.chosen} ({fields}): {metric.title.lower()} {before} to {after} on rows that nothing "
        f"was chosen by (change {metric.span(change.difference)}, 95 %){told}."
    )


def _lines(search: Searching, found: Outcome) -> tuple[str, ...]:
    folder, rows, used = search.folder, search.prepared.rows, spent(found.trials)
    whole = sum(trial.state == "whole" for trial in found.trials)
    failed = sum(trial.state == "failed" for trial in found.trials)
    stopped = len(found.trials) - whole - failed
    losers = f", {failed} failed" if failed else ""
    clear = [one for one in found.importance if one.is_clear]
    settings = ", ".join(f"{one.name} {one.share:.0%}" for one in clear) or "none that chance would not show"
    return (
        f"Data: {rows[TRAIN]:,} rows to train on, {rows[SELECTION]:,} to select by, {rows[FINAL]:,} for the "
        f"final figure -> {folder.data}",
        f"Search: {len(found.trials)} trials, {whole} trained whole, {stopped} stopped early{losers}, "
        f"{used.seconds:,.0f} s, {used.tokens:,} tokens -> {folder.path / 'trials'}",
        f"Front: {', '.join(f'trial {one.number}' for one in found.front)} -> {folder.report}",
        f"Chosen: {chosen_text(search, found)} -> {folder.path / RECIPE}",
        f"Settings that matter: {settings}",
    )
