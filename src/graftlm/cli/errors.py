"""How an error reaches people and machines: three parts on standard error, an object with `--json`."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import typer

from graftlm.cli.output import console, print_json
from graftlm.core.errors import GraftError, StorageError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

# typer's parent of BadParameter: "wrong usage". It has no public name, and lies in another package
# (click) in older versions.
ParseError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


class Interrupted(GraftError):
    """Somebody pressed Ctrl-C."""

    exit_code = 130


def interrupted(stop: KeyboardInterrupt, *, fix: str = "") -> Interrupted:
    """Ctrl-C as an error; a message inside the interrupt (how to resume) wins over `fix`."""
    return Interrupted("Interrupted.", fix=str(stop) or fix)


def as_graft_error(error: Exception, command: str) -> GraftError:
    """Any error in three parts. One that Graft did not raise on purpose is called what it is."""
    if isinstance(error, GraftError):
        return error
    if isinstance(error, ParseError):
        return UsageError(error.format_message(), fix=f"{command} --help")
    if isinstance(error, OSError):
        return StorageError(
            f"{type(error).__name__}: {error}",
            meaning="The operating system refused a file or a device.",
            fix="Check the path, its permissions and the free space.",
        )
    return GraftError(
        f"{type(error).__name__}: {error}",
        meaning="Graft did not expect this: it is a bug in Graft or in a package below it.",
        fix="Repeat with --debug, and report the traceback together with `graft env`.",
    )


def report(error: Exception, *, command: str, as_json: bool, debug: bool) -> int:
    """Print `error` and return the exit code."""
    if debug:
        traceback.print_exception(error)
    known = as_graft_error(error, command)
    console(stderr=True).print(three_parts(known))
    if as_json:
        print_json({**known.as_dict(), "exit_code": known.exit_code})
    return known.exit_code


def three_parts(error: GraftError) -> Text:
    """An error as people see it: what was seen, every problem, what it means, what fixes it."""
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), (error.seen, "bold"))
    for problem in error.problems:
        text.append("\n  - ", style="red").append(problem)
    if error.meaning:
        text.append("\n  meaning: ", style="dim").append(error.meaning)
    if error.fix:
        text.append("\n  fix: ", style="bold green").append(error.fix)
    return text
