"""Write a report and read it back: `report.html` for people, `report.json` for machines."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from graftlm.core.errors import DataError
from graftlm.core.files import write_atomic
from graftlm.evaluation.report_data import ReportData
from graftlm.evaluation.report_page import page


def write_report(path: Path, data: ReportData) -> Path:
    """Write the page at `path` and the same data beside it as `.json`; returns the latter's path.

    Raises:
        StorageError: the disk refuses; what was there before is intact.
    """
    beside = path.with_suffix(".json")
    write_atomic(beside, report_json(data))
    write_atomic(path, page(data))
    return beside


def report_json(data: ReportData) -> str:
    """The data as JSON text; numbers that are not finite become the strings "nan", "inf", "-inf"."""
    return _encodable(
        json.dumps(_plain(dataclasses.asdict(data)), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    )


def read_report(path: Path) -> ReportData:
    """Read `report.json`.

    Raises:
        DataError: there is none, or it is not a report.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(ReportData).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"No file {path}.", fix="Give the report.json of a run folder.") from None
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)
        ]
        raise DataError(
            f"{path} is not a report.", problems=problems[:20], fix="Give the report.json of a run folder."
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _encodable(text: str) -> str:
    """Half surrogates, which a model's broken output may hold, have no bytes."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
