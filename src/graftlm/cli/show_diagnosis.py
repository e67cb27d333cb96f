"""How `graft diagnose` shows what was found in the terminal. Only layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from graftlm.diagnosis.finding import Finding
    from graftlm.verbs.diagnose import Diagnosis

STYLES = {"error": "red", "warning": "yellow", "note": "cyan"}


def render_diagnosis(found: Diagnosis, console: Console) -> None:
    """Print every finding, and what was looked at."""
    for finding in found.findings:
        _render(finding, console)
    style = "bold green" if not found.findings else "bold" if found.passed else "bold red"
    console.print(Text(found.verdict, style=style))
    console.print(Text(f"Looked at {', '.join(found.looked_at) or 'nothing'}.", style="dim"))
    if found.not_looked_at:
        console.print(Text(f"Not looked at: {', '.join(found.not_looked_at)}.", style="dim"))
    if found.written is not None:
        console.print(Text.assemble(("Written to ", "dim"), (str(found.written), "cyan")))


def _render(finding: Finding, console: Console) -> None:
    head = Text.assemble(
        (finding.severity, f"bold {STYLES[finding.severity]}"),
        ("  ", ""),
        (finding.rule, "dim"),
        ("  ", ""),
        (finding.title, "bold"),
        (f"  (confidence {finding.confidence:.0%})", "dim"),
    )
    console.print(head)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("seen", Text(finding.seen))
    table.add_row("meaning", Text(finding.meaning))
    table.add_row("fix", Text(finding.fix))
    console.print(Padding(Group(table), (0, 0, 0, 2)))
    if finding.command:  # on a line of its own, whole, so that it can be copied
        console.print(Text(f"  $ {finding.command}", style="bold"))
    console.print()
