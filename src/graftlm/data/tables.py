"""CSV, TSV, Parquet and hub data sets to rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.json_rows import Parsed, Rows
from graftlm.data.labels.class_labels import names_in, names_in_schema, with_names
from graftlm.data.raw_text import LINE_CAP
from graftlm.data.records import Problem


def parse_csv(lines: Sequence[str | None], delimiter: str) -> Parsed:
    r"""Rows of a table with a header line; quoted fields may hold line breaks.

    Numbers are the line on which a row starts, as an editor shows it.

    >>> parse_csv(['text,label', '"two', 'lines",1', "short"], ",")[:2]
    ([{'text': 'two\nlines', 'label': '1'}], [2])
    """
    broken = {number for number, line in enumerate(lines, start=1) if line is None}
    text = "\n".join("" if line is None else line for line in lines)
    rows: Rows = []
    numbers: list[int] = []
    problems: list[Problem] = []
    before = csv.field_size_limit(LINE_CAP)  # process-wide, so it is put back below
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        start = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                problems.append(_broken_csv(start, str(error)))
                start = reader.line_num + 1
                continue
            span, start = range(start, reader.line_num + 1), reader.line_num + 1
            if not any(cells) or not broken.isdisjoint(span):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                problems += _header_problems(header, span[0])
            elif len(cells) != len(header):
                problems.append(_wrong_width(span[0], len(cells), len(header)))
            else:
                rows.append(dict(zip(header, cells, strict=True)))
                numbers.append(span[0])
    finally:
        csv.field_size_limit(before)
    return rows, numbers, problems


def _header_problems(header: list[str], line: int) -> list[Problem]:
    twice = sorted({name for name in header if header.count(name) > 1})
    if not twice:
        return []
    what = f"the header names {', '.join(map(repr, twice))} more than once; the last one counts"
    return [Problem(line, "warning", "repeated_column", what, "Give every column its own name.")]


def _broken_csv(line: int, message: str) -> Problem:
    fix = "Close every quoted field, and write a quote inside a field twice."
    return Problem(line, "error", "broken_csv", f"broken CSV: {message}", fix)


def _wrong_width(line: int, seen: int, wanted: int) -> Problem:
    what = f"{seen} field{'s' if seen != 1 else ''}, but the header has {wanted}"
    return Problem(line, "error", "wrong_width", what, "Put fields that hold the separator in double quotes.")


def read_parquet(path: Path) -> Parsed:
    """Rows of one Parquet file, numbered from 1.

    Raises:
        DataError: the file is not Parquet or is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows = with_names(table.to_pylist(), names_in_schema(table.schema.metadata))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path.name} cannot be read as Parquet: {' '.join(str(error).split())[:200]}",
            meaning="The file is damaged, incomplete, or another format under this name.",
            fix="Write it again, or name it by its real format.",
        ) from None
    return rows, list(range(1, len(rows) + 1)), []


def read_hub(name: str, split: str) -> Parsed:
    """Rows of one split of a data set on the hub, through `datasets` (no code of the data set runs).

    Raises:
        DataError: the hub, the data set or the split cannot be had.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(
            f"The data set {name!r} (split {split!r}) cannot be loaded: {' '.join(str(error).split())[:200]}",
            meaning="There is no file of this name here, and the hub has no such data set, split or network.",
            fix=f"Check the path. For the hub: owner/name or owner/name:split, such as {name}:test.",
        ) from None
    rows = with_names([dict(row) for row in loaded], names_in(loaded.features.to_dict()))
    return rows, list(range(1, len(rows) + 1)), []
