"""Plain text files: whole paragraphs grouped into rows, nothing lost, nothing added."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from graftlm.data.json_rows import Parsed, Rows
from graftlm.data.records import Problem

#: A line that holds only this separates documents, as in many text corpora.
DOCUMENT_END = "<|endoftext|>"

#: So many rows are aimed at, so that a tenth of them is a usable hold-out.
_WANTED_ROWS = 300
_SMALLEST, _LARGEST = 1_000, 4_000  # characters of one row

_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*\n?)+(?:[^\S\n]*(?:\n|\Z))*")


def parse_text(lines: Sequence[str | None]) -> Parsed:
    r"""Rows `{"text": ..., "continues": ...}` that, joined, are the document again.

    Paragraphs (separated by blank lines) stay whole. `continues` tells that the document goes on in
    the next row, so that only its real end teaches an end token. Numbers are line numbers.

    >>> rows, numbers, _ = parse_text(["One.", "", "Two.", "<|endoftext|>", "Other."])
    >>> [(row["text"], row["continues"]) for row in rows], numbers
    ([('One.\n\nTwo.\n', False), ('Other.', False)], [1, 5])
    """
    rows: Rows = []
    numbers: list[int] = []
    size = sum(len(line or "") + 1 for line in lines)
    wanted = min(max(size // _WANTED_ROWS, _SMALLEST), _LARGEST)
    for first, text in _documents(lines):
        chunks = list(_chunks(text, wanted))
        line = first
        for index, chunk in enumerate(chunks):
            rows.append({"text": chunk, "continues": index < len(chunks) - 1})
            leading = len(chunk) - len(chunk.lstrip())
            numbers.append(line + chunk.count("\n", 0, leading))
            line += chunk.count("\n")
    problems: list[Problem] = []
    return rows, numbers, problems


def _documents(lines: Sequence[str | None]) -> Iterator[tuple[int, str]]:
    first, held = 1, list[str]()
    for number, line in enumerate(lines, start=1):
        if line is not None and line.strip() == DOCUMENT_END:
            yield first, "".join(f"{part}\n" for part in held)
            first, held = number + 1, []
        elif line is not None:
            held.append(line)
    yield first, "\n".join(held)


def _chunks(text: str, wanted: int) -> Iterator[str]:
    """Cut before a paragraph as soon as the piece would grow beyond `wanted` characters."""
    if not text.strip():
        return
    start = 0
    end = 0
    for paragraph in _PARAGRAPH.finditer(text):
        if end - start > 0 and paragraph.end() - start > wanted and text[start:end].strip():
            yield text[start:end]
            start = end
        end = paragraph.end()
    yield text[start:]
