"""`graft env`: the machine and its rates, the versions, and which fast paths are on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm.cli.options import FLAG, Debug, Json, examples
from graftlm.cli.output import console, print_json

if TYPE_CHECKING:
    from graftlm.core.environment import Environment
    from graftlm.planning.machine import Machine, Rates

Measure = Annotated[
    bool,
    typer.Option("--measure", metavar=FLAG, help="Measure the machine's rates now; some seconds, and kept."),
]


def register(app: typer.Typer) -> None:
    """Add the verb of this file to `app`."""
    app.command(
        "env",
        epilog=examples(
            ("graft env", "what to look at first when a run is slow"),
            ("graft env --measure", "with the rates that predictions use"),
            ("graft env --json", "to paste into a bug report"),
        ),
    )(env)


def env(measure: Measure = False, as_json: Json = False, debug: Debug = False) -> int:
    """Machine, rates, versions, fast paths: what is on, and why others are off."""
    from graftlm import api

    environment, machine = api.env(), api.machine(measure=measure)
    if as_json:
        print_json({**environment.as_dict(), "machine": machine.as_dict()})
    else:
        _show(environment, machine)
    return 0


def _show(environment: Environment, machine: Machine) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(environment, machine):
        table.add_row(name, text)
    console().print(table, soft_wrap=False)


def _rows(environment: Environment, machine: Machine) -> list[tuple[str, str]]:
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
    rows.append(("rates", machine.source))
    rows += [(f"  {name}", text) for name, text in _rates(machine.rates)]
    rows.append(("packages", _versions(environment.packages)))
    rows.append(("extras", ""))
    rows += [(f"  {extra.name}", _versions(extra.versions)) for extra in environment.extras]
    rows.append(("fast paths", ""))
    rows += [
        (f"  {path.name}", f"{'on' if path.on else 'off'}: {path.why}") for path in environment.fast_paths
    ]
    return rows


def _rates(rates: Rates) -> list[tuple[str, str]]:
    matrix = ", ".join(f"{_operations(rate)} in {kind}" for kind, rate in sorted(rates.matrix.items()))
    attention = ", ".join(f"{_operations(rate)} in {kind}" for kind, rate in sorted(rates.attention.items()))
    found = [("matrix products", matrix), ("attention", attention)]
    found.append(("memory", f"{rates.bandwidth / 1e9:,.1f} GB/s copied"))
    if rates.decoding:
        found.append(("4 bits to 16", f"{rates.decoding / 1e9:,.1f} billion values/s"))
    found.append(("one operation", f"{1e6 * rates.operation_seconds:,.1f} microseconds"))
    found.append(("disk", f"{rates.disk_read / 1e9:,.2f} GB/s read"))
    return found


def _operations(rate: float) -> str:
    """Per second."""
    return f"{rate / 1e12:,.2f} TFLOP/s" if rate >= 1e11 else f"{rate / 1e9:,.1f} GFLOP/s"


def _versions(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count else "unknown"
