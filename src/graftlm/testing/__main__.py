"""`python -m graftlm.testing`: Graft's own methods through all properties, as one table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping

from graftlm.testing.models import QUANTISED
from graftlm.testing.properties import PROPERTIES
from graftlm.testing.rows import ROWS
from graftlm.testing.suite import MATRIX, ON_QUANTISED, REFUSAL, Report, examine

COLUMNS = (*PROPERTIES, REFUSAL)


def main() -> int:
    """Print the table; 1 if any cell failed."""
    parser = argparse.ArgumentParser(prog="python -m graftlm.testing", description=__doc__)
    parser.add_argument("--method", action="append", choices=ROWS, help="only this row, with its whole table")
    parser.add_argument(
        "--kind", action="append", choices=(*MATRIX, *QUANTISED), help="only this kind of model"
    )
    parser.add_argument("--property", action="append", choices=PROPERTIES, help="only this property")
    options = parser.parse_args()
    reports: dict[str, Report] = {}
    for name in options.method or ROWS:
        start = time.perf_counter()
        kinds = options.kind or (*MATRIX, *ON_QUANTISED)
        reports[name] = examine(ROWS[name], kinds, options.property or tuple(PROPERTIES))
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for name, report in reports.items():
        if options.method:
            print(f"{name}\n{report}\n")
        else:
            for failure in report.failures:
                print(f"FAILED {name}, {failure.property} on {failure.kind}: {failure.words}")
    print(summary(reports))
    return int(any(report.failures for report in reports.values()))


def summary(reports: Mapping[str, Report]) -> str:
    """Methods by properties; a number says on how many kinds of model a property holds."""
    width = max(map(len, reports), default=0) + 1
    lines = [" " * width + "".join(f"{number:>5}" for number in range(1, len(COLUMNS) + 1))]
    for name, report in reports.items():
        lines.append(f"{name:{width}}" + "".join(f"{_entry(report, column):>5}" for column in COLUMNS))
    lines += [f"{number:>3} {column}" for number, column in enumerate(COLUMNS, 1)]
    count = {o: sum(r.count(o) for r in reports.values()) for o in ("holds", "refused", "absent", "failed")}
    lines.append("n: holds on n kinds of model; r: refused as it must be; -: nothing to check; F: failed")
    checked = count["holds"] + count["refused"] + count["failed"]
    lines.append(
        f"{checked} cells (method, model, property) checked: "
        + ", ".join(f"{n} {o}" for o, n in count.items())
    )
    return "\n".join(lines)


def _entry(report: Report, column: str) -> str:
    marks = {"failed": "F", "holds": "", "refused": "r"}
    found = [f"{n}{mark}" for outcome, mark in marks.items() if (n := report.count(outcome, column))]
    return " ".join(found) or "-"


if __name__ == "__main__":
    raise SystemExit(main())
