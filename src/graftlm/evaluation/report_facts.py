"""Sections on how the run went: notices, curves, what was trained, merge check, data, recipe, environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from graftlm.evaluation.measures import MEASURES
from graftlm.evaluation.report_charts import Series, line_chart
from graftlm.evaluation.report_data import (
    Curves,
    DataFacts,
    Fact,
    MergeCheck,
    MetricCurve,
    NextStep,
    Notice,
    Sheet,
    TrainingFacts,
)
from graftlm.evaluation.report_text import count, duration, percent, precise, size, text

T = TypeVar("T")
Lines = list[tuple[str, str | None]]
"""(name, escaped value) pairs; those without a value are left out."""


def notices_section(notices: Sequence[Notice]) -> str:
    """Warnings first."""
    ranked = sorted(notices, key=lambda notice: notice.severity != "warning")
    items = "".join(
        f'<li class="is-{notice.severity}"><b>{notice.severity.capitalize()}</b>{text(notice.text)}'
        f"{_command(notice.fix)}</li>"
        for notice in ranked
    )
    return f'<ul class="notices">{items}</ul>' if items else ""


def curves_section(curves: Curves | None) -> str:
    """How the run went, step by step."""
    if curves is None:
        return ""
    charts = "".join(
        (
            line_chart(
                "Loss",
                [
                    Series("training", curves.loss, marks="smoothed"),
                    Series("held out", curves.held_out, tone="ink", marks="dots"),
                ],
            ),
            line_chart("Gradient norm", [Series("gradient norm", curves.grad_norm)], from_zero=True),
            line_chart("Learning rate", [Series("learning rate", curves.learning_rate)], from_zero=True),
            line_chart(
                "Tokens per second",
                [Series("tokens per second", curves.tokens_per_second)],
                from_zero=True,
                show=count,
            ),
            *map(_metric_chart, curves.metrics),
        )
    )
    refused = f"Steps refused because their loss or gradient was not finite: {count(curves.skipped)}."
    note = f'<p class="note after">{refused}</p>' if curves.skipped else ""
    return f'<section><h2>Training</h2><div class="charts">{charts}</div>{note}</section>' if charts else ""


def _metric_chart(curve: MetricCurve) -> str:
    """A figure of the task over the steps."""
    return line_chart(
        MEASURES[curve.name].title if curve.name in MEASURES else curve.name.replace("_", " "),
        [
            Series("training", curve.training, marks="smoothed"),
            Series("held out", curve.held_out, tone="ink", marks="dots"),
        ],
    )


def training_section(facts: TrainingFacts | None) -> str:
    """What was trained and what it took."""
    if facts is None:
        return ""
    lines: Lines = [
        ("Base", text(facts.base)),
        ("Method", text(facts.method)),
        ("Parameters trained", f"{count(facts.trainable)} of {count(facts.total)}"),
        ("Share", percent(facts.trainable / facts.total, 3) if facts.total else None),
        ("Compute type", _shown(facts.dtype, text)),
        ("Quantisation", _shown(facts.quantization, text)),
        ("Device", _shown(facts.device, text)),
        ("Steps", _shown(facts.steps, count)),
        ("Epochs", _shown(facts.epochs, lambda value: f"{value:g}")),
        ("Time", _shown(facts.seconds, duration)),
        ("Target tokens", _shown(facts.target_tokens, count)),
        ("Tokens per second", _shown(facts.tokens_per_second, count)),
        ("Peak memory", _shown(facts.peak_memory_bytes, size)),
    ]
    rows = "".join(
        f'<tr><td><code>{text(site.modules)}</code></td><td class="n">{count(site.count)}</td>'
        f'<td>{text(site.shape)}</td><td class="n">{count(site.trainable)}</td></tr>'
        for site in facts.sites
    )
    head = '<tr><th>Modules</th><th class="n">Sites</th><th>Shape</th><th class="n">Trained</th></tr>'
    return _section("What was trained", _list(lines) + (f"<table>{head}{rows}</table>" if rows else ""))


def merge_section(check: MergeCheck | None) -> str:
    """The merged model against base and adapter."""
    if check is None:
        return ""
    lines: Lines = [
        ("Outcome", "the same model" if check.passed else "not the same model"),
        ("Mean KL", f"{precise(check.mean_kl)} nats per token"),
        ("Same first choice", percent(check.top1_agreement, 2)),
        ("Largest logit difference", _shown(check.largest_logit_difference, precise)),
        ("Merged type", text(check.dtype)),
        ("Probe inputs", count(check.probes)),
    ]
    return _section("Merge check", _list(lines) + _note(check.note))


def data_section(facts: DataFacts | None) -> str:
    """The training data."""
    if facts is None:
        return ""
    lines: Lines = [
        ("Format", text(facts.format)),
        ("Training rows", count(facts.train_rows)),
        ("Held-out rows", _shown(facts.held_out_rows, count)),
        ("Training tokens", _shown(facts.train_tokens, count)),
        ("Share that is trained on", _shown(facts.target_share, percent)),
        ("Median row", _shown(facts.median_tokens, lambda value: f"{count(value)} tokens")),
        ("Longest row", _shown(facts.longest_tokens, lambda value: f"{count(value)} tokens")),
        ("Cut off", _shown(facts.truncated_rows, lambda value: f"{count(value)} rows")),
        ("Duplicates", _shown(facts.duplicate_rows, lambda value: f"{count(value)} rows")),
    ]
    file = _list([("File", f"<code>{text(facts.path)}</code>")])
    digest = _list([("SHA-256", f"<code>{text(facts.sha256)}</code>")]) if facts.sha256 else ""
    return _section("Data", _list(lines) + f'<div class="paths">{file}{digest}</div>')


def sheet_section(sheet: Sheet) -> str:
    """Facts of another verb."""
    return _section(
        text(sheet.title), _list([(fact.name, text(fact.value)) for fact in sheet.facts]) + _note(sheet.note)
    )


def next_section(steps: Sequence[NextStep]) -> str:
    """What one can do with the result."""
    items = "".join(f"<p>{text(step.text)}{_command(step.command)}</p>" for step in steps)
    return f'<section><h2>What next</h2><div class="card steps">{items}</div></section>' if items else ""


def recipe_section(recipe: str | None) -> str:
    """The effective recipe."""
    return _section("Recipe", f"<pre><code>{text(recipe.rstrip())}</code></pre>") if recipe else ""


def environment_section(facts: Sequence[Fact]) -> str:
    """Versions and machine."""
    return _section("Environment", _list([(fact.name, text(fact.value)) for fact in facts])) if facts else ""


def _section(title: str, body: str) -> str:
    return f'<section><h2>{title}</h2><div class="card">{body}</div></section>'


def _list(lines: Lines) -> str:
    pairs = [(name, value) for name, value in lines if value is not None]
    return (
        "<dl>"
        + "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
        + "</dl>"
    )


def _note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>' if words else ""


def _command(command: str) -> str:
    return f'<code class="command">{text(command)}</code>' if command else ""


def _shown(value: T | None, show: Callable[[T], str]) -> str | None:
    return None if value is None else show(value)
