"""The command `graft`: which verbs there are, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn, TextIO

import typer

from graftlm.cli import adapters, combine, data, diagnose, env, evaluate, plan, search, tune
from graftlm.cli.errors import Interrupted, report
from graftlm.cli.options import FLAG, examples
from graftlm.core.notices import notice
from graftlm.core.version import __version__

app = typer.Typer(
    name="graft",
    help="Graft small trained adapters onto frozen language models.",
    epilog=examples(
        ("graft demo", "everything once, offline"),
        ("graft check train.jsonl", "what would be trained on"),
        ("graft tune train.jsonl --model Qwen/Qwen3-0.6B", "train, evaluate, verify"),
    ),
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
for group in (tune, data, plan, evaluate, diagnose, adapters, combine, env, search):
    group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graft {__version__}")
        raise typer.Exit


@app.callback()
def graft(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", metavar=FLAG, help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; whatever goes wrong has been printed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json, debug = "--json" in options, "--debug" in options
    verbs = {verb.name for verb in app.registered_commands}
    command = " ".join(["graft", *(word for word in arguments[:1] if word in verbs)])
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _as_note
            code = typer.main.get_command(app).main(list(arguments), prog_name="graft", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = Interrupted.exit_code
    # The last line of defence: without --debug nobody sees a traceback, whatever was raised.
    except Exception as error:
        return report(error, command=command, as_json=as_json, debug=debug)
    if code == Interrupted.exit_code:
        return report(Interrupted("Interrupted."), command=command, as_json=as_json, debug=False)
    return int(code or 0)


def _as_note(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """A warning for people: its sentence, without the line of code that gave it."""
    notice(str(message))


def main() -> NoReturn:
    """Entry point of the script `graft`."""
    # OpenMP threads that spin for long make a step several times slower as soon as another program uses a
    # core; not spinning at all costs a third on an idle machine. Measured on two cores, small matrices.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    sys.exit(run(sys.argv[1:]))
