"""What tuning does on real models and data: cases of a task through `graft tune`, a process each.

    python benchmarks/tasks/NAME.py                 run the cases that the results file does not have
    python benchmarks/tasks/NAME.py --jobs 2        two at a time, one thread each
    python benchmarks/tasks/NAME.py --only TEXT     cases whose method, base or data contain TEXT
    python benchmarks/tasks/NAME.py --table         print the table of what was measured so far

A file of `benchmarks/tasks` gives its cases as data and makes one call, `main(__doc__, NAME, cases)`. Rows go
to `results/task-NAME.csv`, one for each case and measure, with 95 % intervals over the held-out rows; a case
that is there is not repeated. `benchmarks/tasks_page.py` makes docs/results/tasks.md from all of these files.
Real models and data are found in `../shared`, or where GRAFT_SHARED says.
"""

from __future__ import annotations

import argparse
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import results
from harness.table import markdown
from harness.task_case import TaskCase, run_case

SEEDS = (42, 43, 44)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantile of 97.5 % of Student's t for a mean of so many values."""
_WRITING = threading.Lock()


def results_file(name: str) -> Path:
    """Where the rows of a set of cases go."""
    return results.FOLDER / f"task-{name}.csv"


def with_seeds(cases: Iterable[TaskCase], seeds: Sequence[int] = SEEDS) -> list[TaskCase]:
    """Each case with every seed, seed by seed, so that a series that is cut short has whole seeds."""
    found = list(cases)
    return [replace(case, seed=seed) for seed in seeds for case in found]


def main(doc: str | None, name: str, cases: Sequence[TaskCase]) -> None:
    """The command line of a file of `benchmarks/tasks`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each if several")
    parser.add_argument("--seeds", type=int, default=None, help="only the first so many seeds")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names contain it")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    if not given.table:
        chosen = [case for case in cases if given.only in " ".join(case.key)]
        seeds = sorted({case.seed for case in chosen})[: given.seeds]
        run_cases(name, [case for case in chosen if case.seed in seeds], jobs=given.jobs)
    print(table(results.read(results_file(name))))


def run_cases(name: str, cases: Sequence[TaskCase], *, jobs: int = 1) -> None:
    """Run what the results file does not have, and keep each case's rows as soon as they are there."""
    path = results_file(name)
    known = {_key(row) for row in results.read(path)}
    todo = [case for case in cases if case.key not in known]

    def one(case: TaskCase) -> None:
        rows = run_case(case, threads=1 if jobs > 1 else None)
        with _WRITING:
            results.append(path, rows)
            print(f"{' '.join(case.key)}: {_said(rows[0])}, {rows[0]['seconds']} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: one table for each task, base and data; a line for each method and measure.

    Values are means over seeds; behind them the 95 % interval of the mean over seeds (Student), or, of one
    seed, the interval over the held-out rows.
    """
    groups = dict.fromkeys((row["task"], row["base"], row["data"]) for row in rows)
    return "\n\n".join(_group(group, [row for row in rows if _of(row) == group]) for group in groups)


def _group(group: tuple[str, str, str], rows: Sequence[Mapping[str, str]]) -> str:
    task, base, data = group
    lines = []
    for method, measure in dict.fromkeys((row["method"], row["measure"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["measure"]) == (method, measure)]
        lines.append((
            method, f"{int(mine[0]['trainable']):,}", measure, over_seeds(mine, "before"),
            over_seeds(mine, "after"), len(mine), mine[0]["steps"],
            f"{statistics.mean(float(row['seconds']) for row in mine):,.0f}",
        ))  # fmt: skip
    heads = ("method", "trained", "measure", "before", "after (95 %)", "seeds", "steps", "seconds")
    return f"### {task}: {base} on {data} ({rows[0]['held_out_rows']} held-out rows)\n\n" + markdown(
        heads, lines
    )


def over_seeds(rows: Sequence[Mapping[str, str]], when: str) -> str:
    """The mean of a column over seeds with its interval.

    >>> over_seeds([{"after": "0.5", "after_low": "0.4", "after_high": "0.6"}], "after")
    '0.500 (0.400 to 0.600)'
    """
    values = [float(row[when]) for row in rows if row[when]]
    if not values:
        return ""
    mean = statistics.mean(values)
    low, high = float(rows[0][f"{when}_low"]), float(rows[0][f"{when}_high"])
    if len(values) > 1:
        half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        low, high = mean - half, mean + half
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _of(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row["task"], row["base"], row["data"]


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return (*_of(row), row["method"], row["seed"])


def _said(row: Mapping[str, Any]) -> str:
    return f"{row['measure']} {row['before']} -> {row['after']} ({row['after_low']} to {row['after_high']})"
