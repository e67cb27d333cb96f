"""How `graft check --task` shows a report in the terminal. Only layout; figures come from the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftlm.cli.show_check import histogram, print_problems

if TYPE_CHECKING:
    from graftlm.data.task_report import TaskReport


def render_task_check(report: TaskReport, console: Console) -> None:
    """Print what the task finds, problems, a length histogram and one row."""
    console.print(Text(report.source, style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(report):
        table.add_row(name, Text(value))
    console.print(table)
    print_problems(report, console)
    console.print(Text(f"\nLengths in {report.lengths.unit}", style="bold"))
    console.print(histogram(report.lengths))
    console.print(Text(f"\nRow {report.sample_row}", style="bold"))
    console.print(Text(report.sample, style="dim"), soft_wrap=True)


def _lines(report: TaskReport) -> Iterator[tuple[str, str]]:
    lengths = report.lengths
    yield "task", f"{report.task} ({report.why})"
    yield "format", f"{report.format.name} ({report.format.why})"
    yield "rows", f"{report.rows:,} read, {report.usable:,} usable"
    yield from report.facts
    yield (
        f"{lengths.unit}",
        f"{lengths.total:,} in all; per row {lengths.smallest:,} to {lengths.largest:,}, "
        f"median {lengths.median:,}, 95 % up to {lengths.percentile_95:,}",
    )
    rows = f" (rows {report.repeated_rows})" if report.repeated else ""
    yield "duplicates", f"{len(report.repeated):,}{rows}"
