"""How `graft plan` shows a choice in the terminal. Only layout; every figure comes from the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from graftlm.verbs.plan_report import Line, PlanReport

_REJECTED = 6


def render_plan(report: PlanReport, console: Console, *, show_all: bool) -> None:
    """Print what was planned for, the options as a table, why the first is first, and what is not
    possible."""
    for name, value in report.heading:
        console.print(Text.assemble((f"{name:<8}", "cyan"), value))
    if report.lines:
        shown = report.lines if show_all else report.shown
        console.print(_table(shown, with_cost=any(line.cost for line in shown)))
        if len(shown) < len(report.lines):
            console.print(Text(f"{len(report.lines) - len(shown)} more with --all", style="dim"))
        _list(console, f"Why {report.lines[0].label}", report.reasons, "green")
    else:
        console.print(Text("\nNothing fits.", style="bold red"))
    _list(console, "Not possible", report.turned_down if show_all else report.turned_down[:_REJECTED], "red")
    rest = 0 if show_all else len(report.turned_down) - _REJECTED
    if rest > 0:
        console.print(Text(f"  and {rest} more with --all", style="dim"))
    _list(console, "Notes", report.notes, "dim")
    _list(console, "Next", report.next_steps, "bold")


def _table(lines: Sequence[Line], *, with_cost: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("option", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    if with_cost:
        table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("trained", justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("runs as", overflow="fold")
    for number, line in enumerate(lines, 1):
        cost = [line.cost] if with_cost else []
        cells = [
            str(number),
            line.label,
            line.memory,
            line.time,
            *cost,
            line.trainable,
            line.gain,
            line.runs_as,
        ]
        table.add_row(*cells, style="bold" if number == 1 else "")
    return table


def _list(console: Console, title: str, items: Sequence[str], style: str) -> None:
    if items:
        console.print(Text(f"\n{title}", style="bold"))
    for item in items:
        console.print(Text.assemble(("  - ", style), item))
