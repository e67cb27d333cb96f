"""Write the tables of docs/results/tasks.md from the results files of `benchmarks/tasks`.

    python benchmarks/tasks_page.py            rewrite what stands between the page's markers
    python benchmarks/tasks_page.py --check    only say whether the page is as the results have it

A table stands between `<!-- results: NAME -->` and `<!-- end -->`, NAME as in `results/task-NAME.csv`; all
else on the page is written by hand. Results without a place on the page get one at its end.
"""

from __future__ import annotations

import re
from pathlib import Path

from harness import results
from harness.page import write_page
from task_runs import results_file, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "tasks.md"
NOT_MEASURED = "not measured"
PLACE = re.compile(r"(<!-- results: ([\w-]+) -->)\n.*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every table as the results have it now."""
    places = [match[2] for match in PLACE.finditer(text)]
    for path in sorted(results.FOLDER.glob("task-*.csv")):
        name = path.stem.removeprefix("task-")
        if name not in places:
            text = f"{text.rstrip()}\n\n## {name}\n\n<!-- results: {name} -->\n<!-- end -->\n"
    return PLACE.sub(lambda match: f"{match[1]}\n\n{_tables(match[2])}\n\n{match[3]}", text)


def _tables(name: str) -> str:
    rows = results.read(results_file(name))
    if not rows:
        return NOT_MEASURED
    where = dict.fromkeys((row["machine"], row["versions"], row["date"]) for row in rows)
    seen = "; ".join(", ".join(each) for each in where)
    return f"{table(rows)}\n\n`python benchmarks/tasks/{name}.py`: {seen}"


def main() -> None:
    write_page(__doc__, PAGE, filled)


if __name__ == "__main__":
    main()
