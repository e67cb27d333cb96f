"""Charts of a search as inline SVG: the front, how trials were stopped, and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from graftlm.evaluation.report_charts import ticks
from graftlm.evaluation.report_text import short, text

Kind = Literal["front", "whole", "stopped"]
Show = Callable[[float], str]
Place = Callable[[float], float]
_TONES = {"front": "accent", "whole": "ink", "stopped": "before"}

STYLE = """
.front-line{stroke:var(--accent);stroke-width:2;opacity:.5}
.noise{fill:var(--accent);opacity:.1}
.mark{fill:var(--mark);stroke:var(--card);stroke-width:1.5}
.mark.hollow{fill:var(--card);stroke:var(--mark);stroke-width:1.5}
.error{stroke:var(--mark);stroke-width:2;opacity:.4}
.name{font-size:12px;fill:var(--ink);font-weight:600}
.thread{fill:none;stroke:var(--mark);stroke-width:1.5;vector-effect:non-scaling-stroke;opacity:.3}
.thread.strong{stroke-width:2.5;opacity:.9}
.tall .plot{padding-top:12px;padding-bottom:34px;padding-left:56px}
.wide .plot{padding:26px 60px 10px 60px}
.wide,.tall{grid-column:1/-1}
td.fields{font-size:14px;max-width:420px}
td.role{white-space:nowrap;padding-left:16px}
tr.is-chosen td{background:var(--accent-soft)}
.scroll{overflow-x:auto}
"""


@dataclass(frozen=True)
class Mark:
    """One trial on the plane of cost and quality; `error` is half of its 95 % interval."""

    number: int
    cost: float
    value: float
    error: float
    kind: Kind
    name: str = ""
    """What is written beside it: best, knee, chosen."""
    title: str = ""
    """Shown when somebody points at it."""


def front_chart(
    title: str, marks: Sequence[Mark], noise: tuple[float, float] | None, names: tuple[str, str],
    shows: tuple[Show, Show],
) -> str:  # fmt: skip
    """Every trial by cost (log) and value; the line joins the front, the band is what equals the best."""
    drawn = [mark for mark in marks if mark.cost > 0 and math.isfinite(mark.value)]
    if not drawn:
        return ""
    x_low, x_high = _log_range([mark.cost for mark in drawn])
    whole = [mark for mark in drawn if mark.kind != "stopped"] or drawn
    inside = _clipped([mark.value for mark in drawn], [mark.value for mark in whole])
    y_low, y_high = _padded(*inside)

    def x(cost: float) -> float:
        return (math.log10(cost) - x_low) / (x_high - x_low) * 100

    def y(value: float) -> float:
        return min(100.0, max(0.0, 100 - (value - y_low) / (y_high - y_low) * 100))

    body = [*_y_grid(y_low, y_high, y, shows[1]), *_x_grid(x_low, x_high, x, names[0], shows[0])]
    if noise is not None:
        top, bottom = sorted((y(noise[0]), y(noise[1])))
        body.append(f'<rect class="noise" x="0" width="100%" y="{top:.2f}%" height="{bottom - top:.2f}%"/>')
    ends = sorted((mark for mark in drawn if mark.kind == "front"), key=lambda mark: mark.cost)
    for one, other in pairwise(ends):
        body.append(
            f'<line class="front-line" x1="{x(one.cost):.2f}%" y1="{y(one.value):.2f}%"'
            f' x2="{x(other.cost):.2f}%" y2="{y(other.value):.2f}%"/>'
        )
    body += [_mark(mark, x, y) for mark in sorted(drawn, key=lambda mark: mark.kind == "front")]
    legend = _legend((("accent", "front"), ("ink", "trained whole"), ("before", "stopped early")), drawn)
    summary = text(f"{len(drawn)} trials by {names[0]} and {names[1]}")
    return (
        f'<figure class="chart tall"><figcaption><span class="name">{text(title)}</span>{legend}</figcaption>'
        f'<div class="plot"><svg role="img" aria-label="{summary}" width="100%" height="320">'
        f"{''.join(body)}</svg></div></figure>"
    )


def _mark(mark: Mark, x: Place, y: Place) -> str:
    left, top = f"{x(mark.cost):.2f}%", f"{y(mark.value):.2f}%"
    error = ""
    if mark.error and mark.kind != "stopped":
        ends = y(mark.value - mark.error), y(mark.value + mark.error)
        error = f'<line class="error" x1="{left}" x2="{left}" y1="{ends[0]:.2f}%" y2="{ends[1]:.2f}%"/>'
    hollow, radius = (" hollow", 3.5) if mark.kind == "stopped" else ("", 5)
    at_right = x(mark.cost) > 80
    anchor, shift = ("end", -9) if at_right else ("start", 9)
    name = (
        f'<text class="name" x="{left}" y="{top}" dx="{shift}" dy="-7" text-anchor="{anchor}">'
        f"{text(mark.name)}</text>"
        if mark.name
        else ""
    )
    return (
        f'<g class="{_TONES[mark.kind]}"><title>{text(mark.title)}</title>{error}'
        f'<circle class="mark{hollow}" cx="{left}" cy="{top}" r="{radius}"/>{name}</g>'
    )


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates: where each trial stands on it (0 to 1), and what its ends are called.
    None where a trial has no such setting."""

    name: str
    places: tuple[float | None, ...]
    labels: tuple[tuple[float, str], ...]


def parallel_chart(title: str, axes: Sequence[Axis], kinds: Sequence[Kind], titles: Sequence[str]) -> str:
    """A thread for each trial through all of its settings to what it was worth; the front is drawn strong."""
    if len(axes) < 2 or not kinds:
        return ""
    step = 1000 / (len(axes) - 1)
    order = sorted(range(len(kinds)), key=lambda index: kinds[index] == "front")
    threads = []
    for index in order:
        points = [
            f"{number * step:.1f},{1000 - 1000 * place:.1f}"
            for number, axis in enumerate(axes)
            if (place := axis.places[index]) is not None
        ]
        strong = " strong" if kinds[index] == "front" else ""
        threads.append(
            f'<g class="{_TONES[kinds[index]]}"><polyline class="thread{strong}" points="{" ".join(points)}">'
            f"<title>{text(titles[index])}</title></polyline></g>"
        )
    lines = []
    for number, axis in enumerate(axes):
        left = f"{100 * number / (len(axes) - 1):.2f}%"
        lines.append(f'<line class="axis" x1="{left}" x2="{left}" y1="0" y2="100%"/>')
        lines.append(f'<text class="name" x="{left}" y="-12" text-anchor="middle">{text(axis.name)}</text>')
        lines += [
            f'<text class="tick" x="{left}" y="{100 - 100 * place:.2f}%" dx="6" dy="4">{text(label)}</text>'
            for place, label in axis.labels
        ]
    return (
        f'<figure class="chart wide"><figcaption><span class="name">{text(title)}</span></figcaption>'
        f'<div class="plot"><svg role="img" aria-label="{text(title)}" width="100%" height="260">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
        f"{''.join(threads)}</svg>{''.join(lines)}</svg></div></figure>"
    )


@dataclass(frozen=True)
class Path:
    """One trial on its way: share of its steps and value at each rung."""

    number: int
    points: tuple[tuple[float, float], ...]
    kind: Kind
    title: str


def halving_chart(title: str, paths: Sequence[Path], show: Show) -> str:
    """Value of every trial over the share of its steps: where it was stopped, or that it reached the end."""
    drawn = [path for path in paths if path.points]
    if not drawn or all(len(path.points) < 2 for path in drawn):
        return ""
    values = [value for path in drawn for _, value in path.points]
    ends = [path.points[-1][1] for path in drawn if path.kind != "stopped"] or values
    y_low, y_high = _padded(*_clipped(values, [*ends, *(path.points[0][1] for path in drawn[:1])]))

    def y(value: float) -> float:
        return min(100.0, max(0.0, 100 - (value - y_low) / (y_high - y_low) * 100))

    body = _y_grid(y_low, y_high, y, show)
    shares = sorted({share for path in drawn for share, _ in path.points})
    body += [
        f'<text class="tick" x="{100 * share:.2f}%" y="100%" dy="18" text-anchor="middle">{share:.0%}</text>'
        for index, share in enumerate(shares)
        if index == 0 or share - shares[index - 1] > 0.05
    ]
    for path in sorted(drawn, key=lambda one: one.kind == "front"):
        strong = " strong" if path.kind == "front" else ""
        places = " ".join(f"{1000 * share:.1f},{10 * y(value):.1f}" for share, value in path.points)
        dots = "".join(
            f'<circle class="mark" cx="{100 * share:.2f}%" cy="{y(value):.2f}%" r="3.5"/>'
            for share, value in path.points
        )
        body.append(
            f'<g class="{_TONES[path.kind]}"><title>{text(path.title)}</title>'
            '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
            f'<polyline class="thread{strong}" points="{places}"/></svg>{dots}</g>'
        )
    return (
        f'<figure class="chart tall"><figcaption><span class="name">{text(title)}</span></figcaption>'
        f'<div class="plot"><svg role="img" aria-label="{text(title)}" width="100%" height="240">'
        f"{''.join(body)}</svg></div></figure>"
    )


def _legend(entries: Sequence[tuple[str, str]], drawn: Sequence[Mark]) -> str:
    present = {_TONES[mark.kind] for mark in drawn}
    return "".join(f'<span class="key {tone}">{name}</span>' for tone, name in entries if tone in present)


def _y_grid(low: float, high: float, y: Place, show: Show) -> list[str]:
    return [
        f'<line class="grid" x1="0" x2="100%" y1="{y(mark):.2f}%" y2="{y(mark):.2f}%"/>'
        f'<text class="tick" x="-8" y="{y(mark):.2f}%" dy="4" text-anchor="end">{text(show(mark))}</text>'
        for mark in ticks(low, high, 5)
    ]


def _x_grid(low: float, high: float, x: Place, name: str, show: Show) -> list[str]:
    """Marks at 1, 2 and 5 of each power of ten."""
    marks = [
        factor * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in (1, 2, 5)
        if low <= math.log10(factor * 10.0**power) <= high
    ]
    stride = -(-len(marks) // 8)
    return [
        '<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>',
        *(
            f'<text class="tick" x="{x(mark):.2f}%" y="100%" dy="18" text-anchor="middle">'
            f"{text(show(mark))}</text>"
            for mark in marks[::stride]
        ),
        f'<text class="tick" x="100%" y="100%" dy="32" text-anchor="end">{text(name)} (log)</text>',
    ]


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.08 * (high - low), 0.05)
    return low - room, high + room


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _clipped(values: Sequence[float], whole: Sequence[float]) -> tuple[float, float]:
    """The range to draw: diverged trials lie at the edge, rather than press all others into one line."""
    low, high = min(whole), max(whole)
    reach = max(3 * (high - low), 0.25 * max(abs(low), abs(high)), 1e-9)
    return max(min(values), low - reach), min(max(values), high + reach)


def parameter_count(value: float) -> str:
    """For an axis: 57344 is 57k."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return short(value)
