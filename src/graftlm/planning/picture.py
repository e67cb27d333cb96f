"""A picture of what options take in memory: one stack for each, beside the memory that there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftlm.core.errors import MissingDependency, UsageError
from graftlm.core.files import write_atomic
from graftlm.evaluation.report_style import LIGHT
from graftlm.evaluation.report_text import text
from graftlm.planning.amounts import in_gib, in_time
from graftlm.planning.drawing import Drawing, png, svg
from graftlm.planning.estimates import Part, Phase
from graftlm.planning.option import Choice, Option

ENDINGS = (".svg", ".html", ".png")
COLOURS = (
    *("#5c7f86", "#17714b", "#9bbf6b", "#3c8dbc", "#c98a1b", "#7b5ea7"),
    *("#b06a8c", "#e0b84c", "#2f4858", "#8c5a3c", "#6fc3b2", "#b9b4a0"),
)
"""Of the parts of a stack, in the order in which they first come."""
_LEFT, _RIGHT, _TOP, _ROW, _BAR = 170, 190, 74, 40, 22
_PLOT = 560
_LEGEND_COLUMNS = 4
_SLIVER, _REST = 0.004, "all else"
"""Share of the width below which a part is not drawn alone."""


@dataclass(frozen=True)
class _Scale:
    """From bytes to places."""

    most: float

    def x(self, amount: float) -> float:
        return _LEFT + _PLOT * amount / self.most


def require_ending(path: Path) -> None:
    """Refuse a file that is none of the kinds that can be drawn.

    Raises:
        UsageError: another ending. MissingDependency: .png, and Pillow is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(
            f"{path} is no picture that can be drawn.",
            meaning=f"The ending says what is written: {', '.join(ENDINGS)}.",
            fix=f"--picture {path.with_suffix('.svg')}",
        )
    if path.suffix.lower() == ".png":
        try:
            import PIL  # noqa: F401  asked for before a minute of work, not after it
        except ImportError:
            raise MissingDependency("pillow", extra="pictures") from None


def write_picture(path: Path, choice: Choice, options: Sequence[Option], title: str) -> None:
    """Draw the worst moment of each option, class by class.

    Raises:
        StorageError: the disk refuses.
    """
    drawing = stacks(choice, options, title)
    ending = path.suffix.lower()
    if ending == ".png":
        write_atomic(path, png(drawing))
    elif ending == ".html":
        write_atomic(path, _page(title, svg(drawing)))
    else:
        write_atomic(path, svg(drawing))


def stacks(choice: Choice, options: Sequence[Option], title: str) -> Drawing:
    """The shapes: a heading, a stack for each option, the memory as a line, and a legend."""
    worst = [option.fit.memory.worst for option in options]
    limit = choice.machine.memory_bytes
    scale = _Scale(1.04 * max([limit, *(phase.bytes for phase in worst)]))
    worst = [_without_slivers(phase, _SLIVER * scale.most) for phase in worst]
    names = list(dict.fromkeys(part.name for phase in worst for part in phase.parts))
    legend_rows = -(-len(names) // _LEGEND_COLUMNS)
    bottom = _TOP + _ROW * len(options)
    drawing = Drawing(_LEFT + _PLOT + _RIGHT, bottom + 34 + 22 * legend_rows, LIGHT["page"])
    drawing.text(24, 30, title, LIGHT["ink"], size=17, bold=True)
    drawing.text(24, 52, f"worst moment of each option on {choice.machine.name}", LIGHT["muted"], size=13)
    for row, (option, phase) in enumerate(zip(options, worst, strict=True)):
        top = _TOP + _ROW * row
        drawing.text(_LEFT - 12, top + 16, option.label, LIGHT["ink"], size=13, anchor="end")
        for name, start, end in _segments(phase):
            colour = COLOURS[names.index(name) % len(COLOURS)]
            hint = f"{option.label}, {phase.name}: {name} {in_gib(end - start)}"
            drawing.rectangle(scale.x(start), top, scale.x(end) - scale.x(start), _BAR, colour, hint)
        said = f"{in_gib(phase.bytes)} ({phase.name}), {in_time(option.fit.time.seconds)}"
        drawing.text(scale.x(phase.bytes) + 8, top + 16, said, LIGHT["muted"], size=12)
    drawing.line(scale.x(limit), _TOP - 8, scale.x(limit), bottom - 8, LIGHT["bad"])
    drawing.text(scale.x(limit), bottom + 8, in_gib(limit), LIGHT["bad"], size=12, anchor="middle")
    for place, name in enumerate(names):
        x = 24 + (place % _LEGEND_COLUMNS) * 220
        y = bottom + 26 + 22 * (place // _LEGEND_COLUMNS)
        drawing.rectangle(x, y, 13, 13, COLOURS[place % len(COLOURS)], name)
        drawing.text(x + 20, y + 11, name, LIGHT["muted"], size=12)
    return drawing


def _without_slivers(phase: Phase, least: float) -> Phase:
    """Parts that would be too thin to be seen, as one; parts of one name lie together."""
    amounts: dict[str, float] = {}
    for part in phase.parts:
        name = part.name if part.amount >= least else _REST
        amounts[name] = amounts.get(name, 0.0) + max(0.0, part.amount)
    rest = amounts.pop(_REST, 0.0)
    return Phase(phase.name, tuple(Part(*item) for item in [*amounts.items(), (_REST, rest)] if item[1] > 0))


def _segments(phase: Phase) -> Iterator[tuple[str, float, float]]:
    """Name, start and end in bytes of each part."""
    start = 0.0
    for part in phase.parts:
        yield part.name, start, start + part.amount
        start += part.amount


def _page(title: str, drawn: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'</head><body style="margin:0;background:{LIGHT["page"]}">{drawn}</body></html>\n'
    )
