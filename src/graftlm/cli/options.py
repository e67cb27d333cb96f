"""Options that several verbs share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OUTPUT = "Output"
"""Help panel of the options that every verb has."""

FLAG = ""
"""Metavar of an option without a value: nothing, where typer would print its type."""

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        metavar=FLAG,
        help="Last line of standard output is one JSON object.",
        rich_help_panel=OUTPUT,
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", metavar=FLAG, help="Show the traceback of an error.", rich_help_panel=OUTPUT),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="M", help="Base model, where the adapter does not say or moved."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Local folder, hub id, or 'sprout' (embedded)."),
]
Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER|RUN", help="Adapter folder (PEFT layout) or run folder.")
]
NewFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder to write.")]


def examples(*lines: tuple[str, str]) -> str:
    """The epilog of a verb's help: how people type it, and what for."""
    width = max(len(command) for command, _ in lines)
    shown = (f"[bold]{command.ljust(width)}[/bold]  [dim]{why}[/dim]" for command, why in lines)
    return "\n".join(["[dim]Examples[/dim]", *shown])
