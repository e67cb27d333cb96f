"""Write the tables of docs/results/tasks.md from the results files of `benchmarks/tasks`.

    python benchmarks/tasks_page.py            rewrite what stands between the page's markers
    python benchmarks/tasks_page.py --check    only say whether the page is as the results have it

A table stands between `<!-- results: NAME -->` and `<!-- end -->`, NAME as in `results/task-NAME.csv`; all
else on the page is written by hand. Results without a place on the page get one at its end.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from harness import results
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the page is out of date"
    )
    given = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    new = filled(text)
    if given.check:
        raise SystemExit("docs/results/tasks.md is out of date" if new != text else 0)
    PAGE.write_text(new, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(PAGE.parents[2])}")


if __name__ == "__main__":
    main()
