"""The section on known failures: what was seen, what it means, what fixes it, and the evidence drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from graftlm.diagnosis.finding import Finding, Plot
from graftlm.evaluation.report_charts import Series, bar_chart, line_chart
from graftlm.evaluation.report_text import percent, precise, text

MOST_BARS = 16
_TONES: tuple[Literal["accent", "ink", "before"], ...] = ("accent", "ink", "before")


def findings_section(findings: Sequence[Finding]) -> str:
    """Every finding as a card, the worst first as they come."""
    cards = "".join(map(_card, findings))
    return f"<section><h2>Findings</h2>{cards}</section>" if cards else ""


def _card(finding: Finding) -> str:
    sure = percent(finding.confidence)
    command = f'<code class="command">{text(finding.command)}</code>' if finding.command else ""
    parts = (
        ("Seen", text(finding.seen)),
        ("Meaning", text(finding.meaning)),
        ("Fix", text(finding.fix) + command),
    )
    words = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in parts)
    return (
        f'<div class="card finding {finding.severity}"><h3>{text(finding.title)}</h3>'
        f'<p class="who"><b>{finding.severity.capitalize()}</b> \u00b7 {text(finding.rule)} \u00b7 '
        f"{sure} sure</p>"
        f"<dl>{words}</dl>{_drawn(finding.plot)}</div>"
    )


def _drawn(plot: Plot | None) -> str:
    if plot is None:
        return ""
    drawn = _bars(plot) if plot.kind == "bars" else _lines(plot)
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def _lines(plot: Plot) -> str:
    series = [
        Series(name, points, tone=_TONES[place % len(_TONES)], marks="dots" if len(points) <= 40 else "line")
        for place, (name, points) in enumerate(plot.lines.items())
    ]
    places = [x for points in plot.lines.values() for x, _ in points]
    if plot.threshold is not None and places:
        ends = ((min(places), plot.threshold), (max(places), plot.threshold))
        series.append(Series("threshold", ends, tone="limit"))
    return line_chart(f"{plot.title} ({plot.y})" if plot.y else plot.title, series, x_name=plot.x)


def _bars(plot: Plot) -> str:
    """The largest values by name; a threshold is the last bar."""
    points = next(iter(plot.lines.values()), ())
    bars = [(plot.names[int(x)] if int(x) < len(plot.names) else precise(x), value) for x, value in points]
    shown = sorted(bars, key=lambda bar: -bar[1])[:MOST_BARS] if len(bars) > MOST_BARS else bars
    if plot.threshold is not None:
        shown = [*shown, ("threshold", plot.threshold)]
    left = f", the {MOST_BARS} largest of {len(bars)}" if len(bars) > MOST_BARS else ""
    return bar_chart(f"{plot.title} ({plot.y}){left}", shown, precise)
