"""How `graft check` shows a report in the terminal. Only layout; every figure comes from the report."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from graftlm.data.records import Problem
    from graftlm.data.report import CheckReport, Lengths
    from graftlm.data.task_report import TaskReport

_SHOWN = 10
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def render_check(report: CheckReport, console: Console) -> None:
    """Print facts, problems, a length histogram and one row with its trained part marked.

    Trained tokens are bold green. Without colours (a pipe, a dumb terminal) they stand in ⟦ ⟧.
    """
    console.print(Text(report.source, style="bold"))
    console.print(_facts(report))
    print_problems(report, console)
    console.print(Text(f"\nLengths in {report.lengths.unit}", style="bold"))
    console.print(histogram(report.lengths))
    console.print(Text(f"\nRow {report.sample_row} as it is trained", style="bold"), end="")
    coloured = console.color_system is not None
    legend = "  (green: learnt, dim: only read)\n" if coloured else "  (⟦learnt⟧, the rest is only read)\n"
    console.print(Text(legend, style="dim"), end="")
    console.print(_sample(report, coloured=coloured), soft_wrap=not coloured)


def _facts(report: CheckReport) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _fact_lines(report):
        table.add_row(name, Text(value))
    return table


def _fact_lines(report: CheckReport) -> Iterator[tuple[str, str]]:
    lengths, found = report.lengths, report.duplicates
    yield "format", f"{report.format.name} ({report.format.why})"
    yield "rows", f"{report.rows:,} read, {report.examples:,} examples, {report.usable:,} usable"
    yield "split", f"{report.train_rows:,} to train on, {report.held_out_rows:,} held out"
    yield "template", report.template
    yield (
        f"{lengths.unit}",
        f"{lengths.total:,} in all; per row {lengths.smallest:,} to {lengths.largest:,}, "
        f"median {lengths.median:,}, 95 % up to {lengths.percentile_95:,}, "
        f"99 % up to {lengths.percentile_99:,}",
    )
    yield "learnt", f"{report.trained_share:.1%} of the {lengths.unit} (train_on: {report.train_on})"
    if report.ends_with_end_token is not None:
        yield (
            "end token",
            f"{report.ends_with_end_token:.1%} of the rows end with {report.end_token or 'none'}",
        )
        yield "too long", _too_long(report)
    yield (
        "duplicates",
        f"{len(found.exact):,} exact, {len(found.near):,} near{_rows(report, [a for a, _ in found.near])}",
    )
    yield "hold-out", f"{len(found.leaked):,} rows of it are in the training part"
    if report.short_rows or report.long_rows:
        short, long = _rows(report, report.short_rows), _rows(report, report.long_rows)
        yield (
            "unusual",
            f"{len(report.short_rows):,} very short{short}, {len(report.long_rows):,} very long{long}",
        )


def _too_long(report: CheckReport) -> str:
    kinds = {
        "answer_truncated": "answers cut",
        "prompt_shortened": "prompts shortened",
        "conversation_shortened": "conversations shortened",
        "nothing_trained": "rows dropped",
    }
    counts = [f"{report.count(code):,} {name}" for code, name in kinds.items() if report.count(code)]
    return f"{', '.join(counts) or 'nothing'} (max_length {report.max_length:,})"


def _rows(report: CheckReport, numbers: tuple[int, ...] | list[int]) -> str:
    return f" (rows {report.ranges(numbers, limit=5)})" if numbers else ""


def print_problems(report: CheckReport | TaskReport, console: Console) -> None:
    """The first problems, and how many there are of each kind besides."""
    if not report.problems:
        console.print(Text("\nNo problems.", style="bold green"))
        return
    errors, warnings = len(report.errors), len(report.warnings)
    console.print(Text(f"\nProblems: {errors:,} rows left out, {warnings:,} warnings", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for problem in report.problems[:_SHOWN]:
        table.add_row(*_problem(problem))
    console.print(table)
    rest = report.problems[_SHOWN:]
    if rest:
        kinds = groupby(sorted(problem.code for problem in rest))
        counts = ", ".join(f"{len(list(group)):,} {code}" for code, group in kinds)
        console.print(Text(f"  and {len(rest):,} more: {counts}", style="dim"))


def _problem(problem: Problem) -> tuple[Text, Text]:
    style = "red" if problem.severity == "error" else "yellow"
    where = "" if problem.row is None else f"row {problem.row}: "
    return Text(problem.severity, style), Text.assemble(f"{where}{problem.what}. ", (problem.fix, "dim"))


def histogram(lengths: Lengths) -> Table:
    """How many rows have which length, as bars."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    most = max(count for _, _, count in lengths.histogram)
    for low, high, count in lengths.histogram:
        table.add_row(
            f"{low:,}-{high:,}" if low != high else f"{low:,}", Text(f"{_bar(count, most)} {count:,}")
        )
    return table


def _bar(count: int, most: int) -> str:
    eighths = -(-count * _BAR * 8 // most)
    return (_EIGHTHS[-1] * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _sample(report: CheckReport, *, coloured: bool) -> Text:
    text = Text()
    for trained, pieces in groupby(report.sample, key=lambda piece: piece[1]):
        joined = "".join(piece for piece, _ in pieces)
        if coloured:
            text.append(joined, style="bold green" if trained else "dim")
        else:
            text.append(f"⟦{joined}⟧" if trained else joined)
    return text
