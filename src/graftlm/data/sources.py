"""Where rows come from: a file of any supported kind, or a data set on the hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from graftlm.core.errors import DataError
from graftlm.data.json_rows import Parsed, parse_document, parse_lines
from graftlm.data.plain_text import parse_text
from graftlm.data.raw_text import decode, read_bytes
from graftlm.data.records import Problem
from graftlm.data.tables import parse_csv, read_hub, read_parquet

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w\[\]%:+-]+))?")


class Rows(NamedTuple):
    """What a source holds: rows, their 1-based numbers in the source, and the rows that are broken."""

    rows: list[dict[str, Any]]
    numbers: list[int]
    problems: list[Problem]


def _json(lines: list[str | None]) -> Parsed:
    """JSON of either kind: `.json` files often hold JSON Lines, and `.jsonl` files one array."""
    first = next((line.lstrip() for line in lines if line and line.strip()), "")
    if first.startswith("["):
        return parse_document("\n".join(line or "" for line in lines))
    by_line = parse_lines(lines)
    if len(by_line[0]) > 1 or not first:
        return by_line
    # One object, on one line or pretty-printed over many, may wrap the list of rows.
    whole = parse_document("\n".join(line or "" for line in lines))
    return whole if whole[0] else by_line


_READERS: dict[str, Callable[[list[str | None]], Parsed]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": lambda lines: parse_csv(lines, ","),
    ".tsv": lambda lines: parse_csv(lines, "\t"),
    ".txt": parse_text,
    ".md": parse_text,
}
SUFFIXES = (*_READERS, ".parquet")


def read_rows(source: str | Path) -> Rows:
    """Read every row of a file or hub data set; broken rows become problems, not an exception.

    `source`: a path ending in one of `SUFFIXES` (text kinds also with `.gz`), or `owner/name` or
    `owner/name:split` of the hub. Small text formats are read in plain Python, so that this starts
    without loading any large package.

    Raises:
        DataError: no such file (near names are listed), an unknown kind, or not one usable row
            (its `problems` then lists every broken one).
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise _is_a_folder(path)
    if not path.exists():
        match = _HUB_NAME.fullmatch(str(source))
        if match is None or path.parent.is_dir() or path.suffix.lower() in (*SUFFIXES, ".gz"):
            raise _missing(path)
        parsed = read_hub(match["name"], match["split"] or "train")
    else:
        parsed = _read_file(path)
    found = Rows(*parsed)
    if not found.rows:
        raise _no_rows(str(source), found.problems)
    return found


def _read_file(path: Path) -> Parsed:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if kind == ".parquet":
        return read_parquet(path)
    reader = _READERS.get(kind)
    if reader is None:
        raise DataError(
            f"{path.name}: the ending {kind!r} names no kind of data Graft reads.",
            meaning="The kind of a file is told by its ending.",
            fix=f"Use one of {', '.join(SUFFIXES)} (text kinds also as .gz).",
        )
    lines, undecodable = decode(read_bytes(path))
    rows, numbers, problems = reader(lines)
    return rows, numbers, sorted([*undecodable, *problems], key=lambda problem: problem.row or 0)


def _is_a_folder(path: Path) -> DataError:
    inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in (*SUFFIXES, ".gz"))
    return DataError(
        f"{path} is a folder.",
        meaning="Data is one file or one hub name.",
        fix=f"Name one file in it: {', '.join(inside[:8])}" if inside else "It holds no data file.",
    )


def _missing(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(
            f"No file {path}.",
            meaning=f"The folder {folder} does not exist.",
            fix=f"Check the path; the current folder is {Path.cwd()}.",
        )
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    data = [name for name in names if Path(name).suffix.lower() in (*SUFFIXES, ".gz")]
    return DataError(
        f"No file {path}.",
        meaning="The name is misspelt, or the file is somewhere else.",
        fix=(
            f"Did you mean {' or '.join(str(folder / name) for name in near)}?"
            if near
            else f"Data files in that folder: {', '.join(data[:8]) or 'none'}."
        ),
    )


def _no_rows(source: str, problems: list[Problem]) -> DataError:
    if not problems:
        return DataError(
            f"{source} has no rows.",
            meaning="The file is empty, or holds only a header or blank lines.",
            fix='Give it rows, for instance {"prompt": "2+2=", "completion": "4"} on a line of its own.',
        )
    return DataError(
        f"{source} has no usable row: all {len(problems)} are broken.",
        meaning="The file is another format than its ending says, or it was damaged.",
        fix=problems[0].fix,
        problems=[str(problem) for problem in problems],
    )
