"""The section that sets what was predicted of a run beside what it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graftlm.evaluation.report_data import PredictedFigure, Predictions
from graftlm.evaluation.report_text import duration, signed_percent, size, text

_NAMES = {
    "load": "load the base",
    "evaluate": "measure before and after",
    "attach": "attach the adapter",
    "update": "optimizer step",
    "steps": "training",
}
_HEIGHT = 40
"""Of two bars and the room below them."""


def prediction_section(found: Predictions | None) -> str:
    """Memory by phase as pairs of bars, and time by part as a table."""
    if found is None:
        return ""
    bars = pair_chart("Peak memory by phase", found.peaks, size)
    times = _table("Time", found.times, duration)
    note = f'<p class="note">{text(found.note)}</p>' if found.note else ""
    return f'<section><h2>Predicted and actual</h2><div class="card">{bars}{times}{note}</div></section>'


def pair_chart(title: str, figures: Sequence[PredictedFigure], show: Callable[[float], str]) -> str:
    """Two horizontal bars for each name: predicted above, actual below it."""
    high = max((max(one.predicted, one.actual or 0.0) for one in figures), default=0.0)
    if not high:
        return ""
    rows = "".join(_pair(one, _HEIGHT * place, high, show) for place, one in enumerate(figures))
    said = "; ".join(
        f"{_name(one)}: predicted {show(one.predicted)}"
        + (f", actual {show(one.actual)}" if one.actual is not None else "")
        for one in figures
    )
    return (
        f'<figure class="bars"><figcaption><span class="name">{text(title)}</span>'
        '<span class="key before">predicted</span><span class="key accent">actual</span></figcaption>'
        f'<div class="plot"><svg role="img" aria-label="{text(said)}" width="100%"'
        f' height="{_HEIGHT * len(figures)}">{rows}</svg></div></figure>'
    )


def _pair(one: PredictedFigure, top: int, high: float, show: Callable[[float], str]) -> str:
    ends = [("before", one.predicted, show(one.predicted), 3)]
    if one.actual is not None:
        ends.append(("accent", one.actual, f"{show(one.actual)}, {_deviation(one)}", 19))
    bars = "".join(_bar(tone, top + y, 70 * value / high, said) for tone, value, said, y in ends)
    return f'<text class="tick" x="-10" y="{top + 22}" text-anchor="end">{text(_name(one))}</text>{bars}'


def _bar(tone: str, top: int, width: float, said: str) -> str:
    return (
        f'<g class="{tone}"><rect class="bar" x="0" y="{top}" width="{width:.2f}%" height="13" rx="3"/>'
        f'<text class="tick" x="{width:.2f}%" dx="8" y="{top + 11}">{text(said)}</text></g>'
    )


def _table(title: str, figures: Sequence[PredictedFigure], show: Callable[[float], str]) -> str:
    if not figures:
        return ""
    head = "".join(f'<th class="n">{name}</th>' for name in ("Predicted", "Actual", "Deviation"))
    rows = "".join(
        f'<tr><td>{text(_name(one))}</td><td class="n">{show(one.predicted)}</td>'
        f'<td class="n">{"" if one.actual is None else show(one.actual)}</td>'
        f'<td class="n">{_deviation(one)}</td></tr>'
        for one in figures
    )
    return f"<table><tr><th>{text(title)}</th>{head}</tr>{rows}</table>"


def _name(one: PredictedFigure) -> str:
    return _NAMES.get(one.name, one.name)


def _deviation(one: PredictedFigure) -> str:
    """Of the prediction from what was, as a share of that."""
    return signed_percent(one.predicted / one.actual - 1, 0) if one.actual else ""
