"""Figures as SVG, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "results" / "figures"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "graft"}
WIDTH, HEIGHT = 4.2, 2.8
"""Inches of one panel."""

ROOM = 1.08
"""Of an axis over its largest value."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Curves over a common axis, from zero on; `lines` are drawn thin and dashed, without marks."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Points]
    lines: Mapping[str, Points] = field(default_factory=dict)


def draw_curves(path: Path, panels: Sequence[Panel]) -> bool:
    """Panels side by side; False, and a line that says so, where matplotlib is missing."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(WIDTH * len(panels), HEIGHT), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            for label, points in panel.curves.items():
                axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3.5, label=label)
            for label, points in panel.lines.items():
                axis.plot(*zip(*sorted(points), strict=True), linestyle="--", linewidth=0.8, label=label)
            axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
            points = [point for curve in panel.curves.values() for point in curve]
            axis.set_xlim(0, ROOM * max(x for x, _ in points))
            axis.set_ylim(0, ROOM * max(y for _, y in points))
            if len(panel.curves) + len(panel.lines) > 1:
                axis.legend(frameon=False)
        _save(figure, path)
    return True


def draw_bars(path: Path, title: str, groups: Mapping[str, Mapping[str, float]]) -> bool:
    """Horizontal bars, one group below the other; False where matplotlib is missing."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    bars = [
        (f"{group}: {name}", value) for group, members in groups.items() for name, value in members.items()
    ]
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(2 * WIDTH, 0.24 * len(bars) + 1))
        colours = ["C0" if name.partition(": ")[2].startswith("Graft") else "0.7" for name, _ in bars]
        drawn = axis.barh([name for name, _ in bars], [value for _, value in bars], color=colours)
        axis.bar_label(drawn, fmt="{:,.0f}", padding=3)
        axis.invert_yaxis()
        axis.set_title(title)
        _save(figure, path)
    return True


def _pyplot() -> Any:
    if find_spec("matplotlib") is None:
        print("No figures: matplotlib is not installed (pip install 'graftlm[dev]').")
        return None
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path.relative_to(FIGURES.parents[2])}")
