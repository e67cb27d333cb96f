"""Write the tables of docs/results/planning.md from the results files of the planning benchmarks.

    python benchmarks/planning_page.py            rewrite what stands between the page's markers
    python benchmarks/planning_page.py --check    only say whether the page is as the results have it

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; all else on the page is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import planning_memory
import planning_time
from harness import results
from harness.page import write_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "planning.md"
NOT_MEASURED = "not measured"
PLACE = re.compile(r"(<!-- results: ([\w-]+) -->)\n.*?(<!-- end -->)", re.DOTALL)
Show = Callable[[Sequence[Mapping[str, Any]]], str]
TABLES: Mapping[str, tuple[Path, Show]] = {
    "memory": (planning_memory.RESULTS, planning_memory.show),
    "time": (planning_time.RESULTS, planning_time.show),
}


def filled(text: str) -> str:
    """The page with every table as the results have it now."""
    return PLACE.sub(lambda match: f"{match[1]}\n\n{_table(match[2])}\n\n{match[3]}", text)


def _table(name: str) -> str:
    path, show = TABLES[name]
    rows = results.read(path)
    if not rows:
        return NOT_MEASURED
    latest = {row["name"]: row for row in rows}  # a run that was measured again counts as it was last
    where = dict.fromkeys((row["machine"], row["versions"], row["date"]) for row in latest.values())
    seen = "; ".join(", ".join(each) for each in where)
    return f"{show(list(latest.values()))}\n\n`python benchmarks/planning_{name}.py`: {seen}"


if __name__ == "__main__":
    write_page(__doc__, PAGE, filled)
