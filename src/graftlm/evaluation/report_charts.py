"""Charts as inline SVG that keep their text size at every width: positions are per cent of the plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from graftlm.evaluation.metrics import Interval
from graftlm.evaluation.report_data import Points
from graftlm.evaluation.report_text import precise, short, text

_COLUMNS = 120  # hover bands and pairs of line points that a chart may hold
_SMOOTH_FROM = 40  # with this many points a noisy curve gets a smoothed one on top


@dataclass(frozen=True)
class Series:
    """One line of a chart; `tone` names its colour in the style sheet."""

    label: str
    points: Points
    tone: Literal["accent", "ink", "before", "limit"] = "accent"
    marks: Literal["line", "smoothed", "dots"] = "line"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `most` + 1 of them.

    >>> ticks(0.0, 10.0)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    show: Callable[[float], str] = precise,
    x_name: str = "step",
) -> str:
    """A figure of curves over steps, with axes, a legend (for more than one) and a hover title per column."""
    drawn = [line for line in series if line.points]
    if not drawn:
        return ""
    steps = [step for line in drawn for step, _ in line.points]
    values = [value for line in drawn for _, value in line.points]
    x_low, x_high = _padded(min(steps), max(steps), 0.0)
    low = min(0.0, *values) if from_zero else min(values)
    y_low, y_high = _padded(low, max(values), 0.06)
    if low >= 0 > y_low:
        y_low = 0.0

    def x(step: float) -> float:
        return (step - x_low) / (x_high - x_low) * 100

    def y(value: float) -> float:
        return 100 - (value - y_low) / (y_high - y_low) * 100

    body = [_y_axis(y_low, y_high, y), _x_axis(x_low, x_high, x, x_name)]
    body += [_curve(line, x, y) for line in drawn]
    body.append(_bands(drawn, x, show, x_name))
    summary = "; ".join(_summary(line, show, x_name) for line in drawn)
    legend = "".join(f'<span class="key {line.tone}">{text(line.label)}</span>' for line in drawn)
    return (
        f'<figure class="chart"><figcaption><span class="name">{text(title)}</span>'
        f"{legend if len(drawn) > 1 else ''}</figcaption>"
        f'<div class="plot"><svg role="img" aria-label="{text(summary)}" width="100%" height="190">'
        f"{''.join(body)}</svg></div></figure>"
    )


def interval_chart(before: Interval, after: Interval, show: Callable[[float], str]) -> str:
    """Before and after as dots with their 95 % intervals on one axis."""
    ends = [value for one in (before, after) for value in (one.low, one.high)]
    if not all(map(math.isfinite, ends)):
        return ""
    low, high = _padded(min(ends), max(ends), 0.12)

    def x(value: float) -> float:
        return (value - low) / (high - low) * 100

    parts = []
    for mark in ticks(low, high, 4):
        parts.append(f'<line class="grid" x1="{x(mark):.2f}%" x2="{x(mark):.2f}%" y1="0" y2="64"/>')
        parts.append(f'<text class="tick" x="{x(mark):.2f}%" y="80" text-anchor="middle">{show(mark)}</text>')
    for name, tone, one, height in (("before", "before", before, 18), ("after", "accent", after, 46)):
        label = f"{name}: {show(one.value)}, 95 % interval {show(one.low)} to {show(one.high)}"
        parts.append(
            f'<g class="{tone}"><title>{label}</title>'
            f'<text class="tick" x="-10" y="{height + 4}" text-anchor="end">{name}</text>'
            f'<line class="whisker" x1="{x(one.low):.2f}%" x2="{x(one.high):.2f}%"'
            f' y1="{height}" y2="{height}"/>'
            f'<circle class="dot" cx="{x(one.value):.2f}%" cy="{height}" r="5"/></g>'
        )
    label = f"Before {show(before.value)}, after {show(after.value)}"
    return (
        f'<div class="plot intervals"><svg role="img" aria-label="{label}" width="100%" height="64">'
        f"{''.join(parts)}</svg></div>"
    )


def bar_chart(title: str, bars: Sequence[tuple[str, float]], show: Callable[[float], str]) -> str:
    """A figure of horizontal bars from zero, one under the other, each with its name and its value."""
    if not bars:
        return ""
    high = max(value for _, value in bars) or 1.0
    rows = []
    for place, (name, value) in enumerate(bars):
        y, width = 28 * place, 80 * value / high  # a fifth is left for the value
        rows.append(
            f'<g class="accent"><text class="tick" x="-10" y="{y + 15}" text-anchor="end">{text(name)}</text>'
            f'<rect class="bar" x="0" y="{y + 3}" width="{width:.2f}%" height="16" rx="3"/>'
            f'<text class="tick" x="{width:.2f}%" dx="8" y="{y + 15}">{text(show(value))}</text></g>'
        )
    summary = text("; ".join(f"{name} {show(value)}" for name, value in bars))
    return (
        f'<figure class="bars"><figcaption><span class="name">{text(title)}</span></figcaption>'
        f'<div class="plot"><svg role="img" aria-label="{summary}" width="100%" height="{28 * len(bars)}">'
        f"{''.join(rows)}</svg></div></figure>"
    )


def smoothed(points: Points) -> Points:
    """The mean over a window of a twentieth of the curve around every point; it narrows at the ends.

    A centred window does not lag behind a falling loss as a running mean does.
    """
    reach = max(1, len(points) // 40)
    sums = list(accumulate((value for _, value in points), initial=0.0))
    out = []
    for place, (step, _) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        out.append((step, (sums[place + near + 1] - sums[place - near]) / (2 * near + 1)))
    return tuple(out)


def thinned(points: Points, columns: int = _COLUMNS) -> Points:
    """At most two points per column, its smallest and largest value in their order: no spike is lost."""
    if len(points) <= 2 * columns:
        return points
    out: list[tuple[float, float]] = []
    for column in range(columns):
        part = points[column * len(points) // columns : (column + 1) * len(points) // columns]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        out += sorted(ends)
    return tuple(out)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if not high > low:
        width = abs(high) * 0.1 or 1.0
        return low - width, high + width
    return low - (high - low) * share, high + (high - low) * share


def _y_axis(low: float, high: float, y: Callable[[float], float]) -> str:
    return "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y(mark):.2f}%" y2="{y(mark):.2f}%"/>'
        f'<text class="tick" x="-8" y="{y(mark):.2f}%" dy="4" text-anchor="end">{short(mark)}</text>'
        for mark in ticks(low, high, 4)
    )


def _x_axis(low: float, high: float, x: Callable[[float], float], named: str) -> str:
    marks = [mark for mark in ticks(low, high, 4) if mark == int(mark)]
    labels = "".join(
        f'<text class="tick" x="{x(mark):.2f}%" y="100%" dy="18"'
        f' text-anchor="{_anchor(x(mark))}">{short(mark)}</text>'
        for mark in marks
        if x(mark) < 100 - 4 * len(named)  # room for the axis name
    )
    name = f'<text class="tick" x="100%" y="100%" dy="18" text-anchor="end">{text(named)}</text>'
    return f'<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>{labels}{name}'


def _anchor(position: float) -> str:
    return "start" if position < 3 else "middle"


def _curve(line: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    if line.marks == "dots":
        path = _path(line.points, x, y, "line")
        dots = "".join(
            f'<circle class="dot" cx="{x(s):.2f}%" cy="{y(v):.2f}%" r="3.5"/>'
            for s, v in thinned(line.points)
        )
        return f'<g class="{line.tone}">{path}{dots}</g>'
    if line.marks == "smoothed" and len(line.points) >= _SMOOTH_FROM:
        faint, strong = _path(line.points, x, y, "line faint"), _path(smoothed(line.points), x, y, "line")
        return f'<g class="{line.tone}">{faint}{strong}</g>'
    if len(line.points) == 1:
        step, value = line.points[0]
        dot = f'<circle class="dot" cx="{x(step):.2f}%" cy="{y(value):.2f}%" r="3.5"/>'
        return f'<g class="{line.tone}">{dot}</g>'
    return f'<g class="{line.tone}">{_path(line.points, x, y, "line")}</g>'


def _path(points: Points, x: Callable[[float], float], y: Callable[[float], float], kind: str) -> str:
    places = " ".join(f"{x(step) * 10:.1f},{y(value) * 10:.1f}" for step, value in thinned(points))
    return (
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
        f'<polyline class="{kind}" points="{places}"/></svg>'
    )


def _bands(
    drawn: Sequence[Series], x: Callable[[float], float], show: Callable[[float], str], named: str
) -> str:
    """Invisible columns over the plot that carry the values as titles."""
    steps = sorted({step for line in drawn for step, _ in line.points})
    stride = math.ceil(len(steps) / _COLUMNS)
    sparse = {step for line in drawn if line.marks == "dots" for step, _ in thinned(line.points)}
    kept = sorted({*steps[::stride], *sparse})
    tables = [(line.label, dict(line.points)) for line in drawn]
    out = []
    for place, step in enumerate(kept):
        left = 0.0 if place == 0 else (x(kept[place - 1]) + x(step)) / 2
        right = 100.0 if place == len(kept) - 1 else (x(step) + x(kept[place + 1])) / 2
        shown = [f"{label} {show(table[step])}" for label, table in tables if step in table]
        title = text(f"{named} {step:,.0f}: " + ", ".join(shown))
        out.append(
            f'<rect class="band" x="{left:.2f}%" y="0" width="{right - left:.2f}%" height="100%">'
            f"<title>{title}</title></rect>"
        )
    return "".join(out)


def _summary(line: Series, show: Callable[[float], str], named: str) -> str:
    (first, start), (last, end) = line.points[0], line.points[-1]
    return f"{line.label} from {show(start)} at {named} {first:,.0f} to {show(end)} at {named} {last:,.0f}"
