"""Rectangles, lines and words, as SVG or, where Pillow is installed, as PNG."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Literal

from graftlm.evaluation.report_text import text as escaped

Anchor = Literal["start", "middle", "end"]
FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif'
_SHARP = 2
"""Pixels of a PNG per unit."""


@dataclass(frozen=True)
class _Rectangle:
    x: float
    y: float
    width: float
    height: float
    colour: str
    hint: str


@dataclass(frozen=True)
class _Line:
    x1: float
    y1: float
    x2: float
    y2: float
    colour: str


@dataclass(frozen=True)
class _Words:
    x: float
    y: float
    words: str
    colour: str
    size: float
    anchor: Anchor
    bold: bool


@dataclass
class Drawing:
    """Shapes on a ground, in the order in which they were added; units are CSS pixels from the upper left."""

    width: int
    height: int
    ground: str
    shapes: list[_Rectangle | _Line | _Words] = field(default_factory=list)

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str, hint: str) -> None:
        """`hint` is shown where somebody points at it."""
        self.shapes.append(_Rectangle(x, y, width, height, colour, hint))

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
        """A thin one."""
        self.shapes.append(_Line(x1, y1, x2, y2, colour))

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str,
        *,
        size: float,
        anchor: Anchor = "start",
        bold: bool = False,
    ) -> None:
        """On the line `y`, which its letters stand on."""
        self.shapes.append(_Words(x, y, words, colour, size, anchor, bold))


def svg(drawing: Drawing) -> str:
    """The drawing as a document of its own, and as part of a page."""
    shapes = "".join(map(_shape, drawing.shapes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width} {drawing.height}"'
        f' width="{drawing.width}" height="{drawing.height}" font-family="{escaped(FONT)}">'
        f'<rect width="100%" height="100%" fill="{drawing.ground}"/>{shapes}</svg>\n'
    )


def _shape(shape: _Rectangle | _Line | _Words) -> str:
    if isinstance(shape, _Rectangle):
        return (
            f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
            f' fill="{shape.colour}"><title>{escaped(shape.hint)}</title></rect>'
        )
    if isinstance(shape, _Line):
        return (
            f'<line x1="{shape.x1:.1f}" y1="{shape.y1:.1f}" x2="{shape.x2:.1f}" y2="{shape.y2:.1f}"'
            f' stroke="{shape.colour}" stroke-width="2" stroke-dasharray="6 4"/>'
        )
    weight = ' font-weight="650"' if shape.bold else ""
    return (
        f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}" text-anchor="{shape.anchor}"'
        f' fill="{shape.colour}"{weight}>{escaped(shape.words)}</text>'
    )


def png(drawing: Drawing) -> bytes:
    """The drawing as an image. Needs Pillow."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (_SHARP * drawing.width, _SHARP * drawing.height), drawing.ground)
    pen = ImageDraw.Draw(image)
    anchors: dict[Anchor, str] = {"start": "ls", "middle": "ms", "end": "rs"}
    for shape in drawing.shapes:
        if isinstance(shape, _Rectangle):
            ends = (shape.x, shape.y, shape.x + max(0.0, shape.width - 0.5), shape.y + shape.height)
            pen.rectangle(tuple(_SHARP * end for end in ends), fill=shape.colour)
        elif isinstance(shape, _Line):
            ends = (shape.x1, shape.y1, shape.x2, shape.y2)
            pen.line(tuple(_SHARP * end for end in ends), fill=shape.colour, width=_SHARP)
        else:
            font = ImageFont.load_default(_SHARP * shape.size)
            place = (_SHARP * shape.x, _SHARP * shape.y)
            width = _SHARP // 2 if shape.bold else 0
            pen.text(place, shape.words, shape.colour, font, anchors[shape.anchor], stroke_width=width)
    found = io.BytesIO()
    image.save(found, "PNG")
    return found.getvalue()
