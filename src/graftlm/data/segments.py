"""Rendered text cut into what is trained and what is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of rendered text; `trained` tells whether the model learns to write it."""

    text: str
    trained: bool


def from_spans(text: str, spans: Sequence[Span]) -> list[Segment]:
    """Cut `text` at trained character spans (sorted, not overlapping).

    >>> from_spans("ask answer", [(4, 10)])
    [Segment(text='ask ', trained=False), Segment(text='answer', trained=True)]
    """
    segments = []
    position = 0
    for start, end in spans:
        segments += [Segment(text[position:start], trained=False), Segment(text[start:end], trained=True)]
        position = end
    segments.append(Segment(text[position:], trained=False))
    return [segment for segment in segments if segment.text]


def to_spans(segments: Iterable[Segment]) -> tuple[str, list[Span]]:
    """The whole text and its trained character spans, neighbours joined.

    >>> to_spans([Segment("ask ", False), Segment("answer", True), Segment("</s>", True)])
    ('ask answer</s>', [(4, 14)])
    """
    parts: list[str] = []
    spans: list[Span] = []
    position = 0
    for segment in segments:
        end = position + len(segment.text)
        if segment.trained and segment.text:
            if spans and spans[-1][1] == position:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((position, end))
        parts.append(segment.text)
        position = end
    return "".join(parts), spans
