"""`graft env`: the machine, the versions, and which fast paths are on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from graftlm.cli.options import Debug, Json, examples
from graftlm.cli.output import console, print_json

if TYPE_CHECKING:
    from graftlm.core.environment import Environment


def register(app: typer.Typer) -> None:
    """Add the verb of this file to `app`."""
    app.command(
        "env",
        epilog=examples(
            ("graft env", "what to look at first when a run is slow"),
            ("graft env --json", "to paste into a bug report"),
        ),
    )(env)


def env(as_json: Json = False, debug: Debug = False) -> int:
    """Machine, versions, fast paths: what is on, and why others are off."""
    from graftlm import api

    environment = api.env()
    if as_json:
        print_json(environment.as_dict())
    else:
        _show(environment)
    return 0


def _show(environment: Environment) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(environment):
        table.add_row(name, text)
    console().print(table, soft_wrap=False)


def _rows(environment: Environment) -> list[tuple[str, str]]:
    rows = [
        ("graft", environment.graft),
        ("python", f"{environment.python} on {environment.platform}"),
        ("processor", f"{environment.cpu}, {environment.cores} cores"),
        ("instructions", ", ".join(environment.instruction_sets) or "unknown"),
        ("memory", _gibibytes(environment.memory_bytes)),
    ]
    rows += [
        (f"GPU {index}", f"{gpu.name}, {_gibibytes(gpu.memory_bytes)}, capability {gpu.capability}")
        for index, gpu in enumerate(environment.gpus)
    ]
    rows.append(("packages", _versions(environment.packages)))
    rows.append(("extras", ""))
    rows += [(f"  {extra.name}", _versions(extra.versions)) for extra in environment.extras]
    rows.append(("fast paths", ""))
    rows += [
        (f"  {path.name}", f"{'on' if path.on else 'off'}: {path.why}") for path in environment.fast_paths
    ]
    return rows


def _versions(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count else "unknown"
