"""Sections on what the run achieved: verdict, headline figures, before and after, samples."""

from __future__ import annotations

import re
from collections.abc import Sequence

from graftlm.evaluation.compare import Comparison, Forgetting, SampleChange, ShareChange
from graftlm.evaluation.metrics import LossChange, exact_match, perplexity
from graftlm.evaluation.report_charts import interval_chart
from graftlm.evaluation.report_data import ReportData
from graftlm.evaluation.report_measures import measure_blocks, measure_tile
from graftlm.evaluation.report_text import (
    clipped,
    count,
    number,
    percent,
    short,
    signed,
    signed_percent,
    text,
)
from graftlm.evaluation.verdict import Verdict

_HYPHEN_MINUS = re.compile(r"(?<![\w.-])-(?=\d)")


def verdict_section(verdict: Verdict | None) -> str:
    """The first thing on the page."""
    if verdict is None:
        return ""
    spaced = verdict.text.replace(" -> ", "\u00a0\u2192 ").replace(" %", "\u202f%")
    sentence = text(_HYPHEN_MINUS.sub("\u2212", spaced))
    return (
        f'<section class="verdict {verdict.outcome.lower()}" aria-label="Verdict">'
        f'<span class="pill">{verdict.outcome}</span><p>{sentence}</p></section>'
    )


def tiles(data: ReportData) -> str:
    """Up to four figures that sum the run up."""
    found = []
    if data.comparison is not None:
        for change in data.comparison.measures[:2]:
            label, before, after, rows = measure_tile(change)
            found.append(_tile(label, _arrow(before, after), rows))
        if not data.comparison.measures:
            loss = data.comparison.loss
            rows = f"{count(loss.rows)} rows never trained on"
            figure = _arrow(number(loss.before.value), number(loss.after.value))
            found.append(_tile(text(data.comparison.loss_title), figure, rows))
        match = _answers(data.comparison)
        if match is not None:
            shares = _arrow(percent(match.before.interval.value), percent(match.after.interval.value))
            found.append(_tile("Exact answers", shares, f"of {count(match.after.rows)} asked"))
    if data.forgetting is not None:
        rise = signed_percent(data.forgetting.loss.relative.value)
        found.append(_tile("Loss on known text", rise, "0 means nothing forgotten"))
    if data.training is not None and data.training.total:
        share = percent(data.training.trainable / data.training.total, 2)
        found.append(_tile("Parameters trained", share, f"{count(data.training.trainable)} of them"))
    return f'<section class="tiles" aria-label="In short">{"".join(found)}</section>' if found else ""


def before_and_after(comparison: Comparison | None, forgetting: Forgetting | None) -> str:
    """Every measure with its interval."""
    found = []
    if comparison is not None:
        found += measure_blocks(comparison.measures)
        if comparison.loss_title:
            about = "Rows that were kept out of training."
            # A loss over rows or pairs has no perplexity.
            show = _loss_beside if comparison.measures else _loss_measure
            found.append(show(text(comparison.loss_title), comparison.loss, about))
        match = _answers(comparison)
        if match is not None:
            found.append(_share_measure(match))
    if forgetting is not None:
        found.append(
            _loss_measure(
                "Loss on known text",
                forgetting.loss,
                f"{forgetting.source[:1].upper()}{forgetting.source[1:]}.",
            )
        )
    if not found:
        return ""
    return (
        f'<section><h2>Before and after</h2><div class="card">{"".join(found)}</div>'
        '<p class="note after">Dots are measured values, bars 95\u202f% intervals. Loss is in nats per '
        "token, row or pair: lower is better. The interval of a change is narrower than the bars suggest, "
        "because the same rows are measured twice.</p></section>"
    )


def _answers(comparison: Comparison) -> ShareChange | None:
    """Exact match, where no measure of the task says the same."""
    return None if comparison.labels is not None else comparison.exact_match


def samples_section(comparison: Comparison | None) -> str:
    """Rows side by side."""
    if comparison is None:
        return ""
    groups = (
        ("Improved most", comparison.gains),
        (_worst(comparison.losses), comparison.losses),
        ("Picked at random", comparison.others),
    )
    body = "".join(_group(title, samples, comparison) for title, samples in groups if samples)
    return f"<section><h2>Samples</h2>{body}</section>" if body else ""


def _worst(samples: Sequence[SampleChange]) -> str:
    """What the worst rows have in common."""
    if any(sample.is_right is False for sample in samples):
        return "Wrong answers"
    return "Got worse most" if any(sample.change > 0 for sample in samples) else "Improved least"


def _tile(label: str, figure: str, sub: str) -> str:
    return (
        f'<div class="card tile"><p class="label">{label}</p><p class="figure">{figure}</p>'
        f'<p class="sub">{sub}</p></div>'
    )


def _arrow(before: str, after: str) -> str:
    return f'<span class="from">{before} \u2192</span> {after}'


def _loss_measure(title: str, loss: LossChange, about: str) -> str:
    difference = loss.difference
    figures = (
        f"95\u202f% interval {signed(difference.low)} to {signed(difference.high)}; "
        f"{signed_percent(loss.relative.value)}. "
        f"Perplexity {short_perplexity(loss.before.value)} \u2192 {short_perplexity(loss.after.value)}."
    )
    size = f"{text(about)} {count(loss.rows)} rows, {count(loss.tokens)} tokens."
    return _measure(
        title, signed(difference.value), figures, size, interval_chart(loss.before, loss.after, short_loss)
    )


def _loss_beside(title: str, loss: LossChange, about: str) -> str:
    """The loss of a task that is judged by something else."""
    difference = loss.difference
    figures = f"95\u202f% interval {signed(difference.low)} to {signed(difference.high)}."
    chart = interval_chart(loss.before, loss.after, short_loss)
    return _measure(title, signed(difference.value), figures, f"{about} {count(loss.rows)} rows.", chart)


def _share_measure(match: ShareChange) -> str:
    points = (match.after.interval.value - match.before.interval.value) * 100
    figures = (
        f"{count(match.gained)} rows gained, {count(match.lost)} lost; "
        f"McNemar test {_p_value(match.p_value)}."
    )
    size = f"{count(match.after.correct)} of {count(match.after.rows)} greedy answers equal the reference."
    chart = interval_chart(match.before.interval, match.after.interval, lambda share: percent(share))
    return _measure("Exact answers", f"{signed(points, 1)} points", figures, size, chart)


def _measure(title: str, change: str, figures: str, size: str, chart: str) -> str:
    return (
        f'<div class="measure"><div><h3>{title}</h3><p class="change">{change}</p>'
        f'<p class="note">{figures}</p><p class="note">{size}</p></div>{chart}</div>'
    )


def _p_value(value: float) -> str:
    return "p\u00a0&lt;\u00a00.001" if value < 0.001 else f"p\u00a0=\u00a0{value:.3f}"


def short_loss(value: float) -> str:
    """Three digits behind the point, without trailing zeros."""
    return short(round(value, 3))


def short_perplexity(loss: float) -> str:
    """`exp(loss)` with as many digits as mean something."""
    value = perplexity(loss)
    return number(value, 2) if value < 100 else count(value) if value < 1e9 else f"{value:.1e}"


def _group(title: str, samples: Sequence[SampleChange], comparison: Comparison) -> str:
    cards = "".join(_sample(sample, comparison) for sample in samples)
    return f"<h3>{title}</h3>{cards}"


def _sample(sample: SampleChange, comparison: Comparison) -> str:
    head = (
        f'<div class="head"><b>Row {count(sample.row)}</b><span>loss {number(sample.loss_before)} \u2192 '
        f"{number(sample.loss_after)}</span></div>"
    )
    if sample.answer_before is None or sample.answer_after is None:
        nothing = '<p class="note">Running text, or a row that was not asked: no answers.</p>'
        return f'<article class="card sample">{head}{nothing}</article>'
    reference = sample.reference
    voices = [
        _voice(kind, name, said, reference is not None and exact_match(said, reference))
        for kind, name, said in (
            ("base", comparison.before, sample.answer_before),
            ("adapter", comparison.after, sample.answer_after),
        )
    ]
    if reference is not None:
        voices.append(_voice("reference", "reference", reference, False))
    prompt = f'<div class="prompt"><span class="who">prompt</span>{_said(sample.prompt or "")}</div>'
    return f'<article class="card sample">{head}{prompt}<div class="voices">{"".join(voices)}</div></article>'


def _voice(kind: str, name: str, said: str, matches: bool) -> str:
    ok = ' <span class="ok">\u2713 exact</span>' if matches else ""
    return f'<div class="voice {kind}"><span class="who">{text(name)}{ok}</span>{_said(said)}</div>'


def _said(words: str) -> str:
    shown = words.strip("\n")
    return f'<div class="said" dir="auto">{clipped(shown) if shown else _NOTHING}</div>'


_NOTHING = '<span class="more">(nothing)</span>'
