"""`graft merge` and `graft chat`: use an adapter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm.cli.errors import three_parts
from graftlm.cli.options import Adapter, Base, Debug, Json, NewFolder, examples
from graftlm.cli.output import console, finish, print_json
from graftlm.core.errors import GraftError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from graftlm.verbs.chat import ChatSession


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to `app`."""
    app.command(
        "merge",
        epilog=examples(
            ("graft merge runs/a --out merged", "verified"),
            ("graft merge runs/a --out merged --dtype bfloat16", "stored in 16 bits"),
            ("graft merge runs/a --out merged --requantize int8", "in 8 bits, checked"),
        ),
    )(merge)
    app.command(
        "chat",
        epilog=examples(
            ("graft chat runs/a", "talk; /base compares with the base"),
            ('graft chat runs/a --prompt "Hello"', "one answer, then exit"),
            ("graft chat sprout", "the base alone"),
        ),
    )(chat)


def merge(
    adapter: Adapter,
    out: NewFolder,
    base: Base = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="Number format of the merged model.")
    ] = None,
    into: Annotated[
        str,
        typer.Option(
            "--into",
            metavar="trained|original",
            help="Of a quantised base: the weights that the adapter was trained on, or those before.",
        ),
    ] = "trained",
    requantize: Annotated[
        str | None,
        typer.Option("--requantize", metavar="KIND", help="Store it as nf4, fp4, int8, fp8; says the loss."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Requantise although most of the adapter is lost.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write base and adapter as one model, verified."""
    from graftlm import api

    result = api.merge(adapter, out, base=base, dtype=dtype, into=into, requantize=requantize, force=force)
    return finish(result, as_json=as_json)


def chat(
    reference: Annotated[
        str,
        typer.Argument(metavar="ADAPTER|RUN|MODEL", help="Adapter folder, run folder or base model."),
    ],
    base: Base = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this and exit.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 256,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Talk to an adapter or a base."""
    if as_json and prompt is None:
        raise UsageError("--json needs --prompt.", fix="graft chat ADAPTER --prompt TEXT --json")
    from graftlm import api

    session = api.chat(reference, base=base, prompt=prompt, max_new_tokens=max_new_tokens)
    if prompt is None:
        _converse(session)
    elif as_json:
        print_json({"prompt": prompt, "reply": session.reply(prompt)})
    else:
        _say(session, prompt)
    return 0


def _converse(session: ChatSession) -> None:
    """Read lines until the end of input. An error or Ctrl-C ends one answer, not the conversation."""
    notes = console(stderr=True)
    notes.print(
        "/reset forgets the conversation, /base switches the adapter off and on, /quit ends.", style="dim"
    )
    while (line := _ask()) != "/quit":
        try:
            _answer(session, line, notes)
        except GraftError as error:
            notes.print(three_parts(error))
        except KeyboardInterrupt:
            notes.print("\nStopped; /quit ends the conversation.", style="dim")


def _answer(session: ChatSession, line: str, notes: Console) -> None:
    """One line of the conversation; what starts with / is for us."""
    if line == "/reset":
        session.reset()
        notes.print("The conversation starts afresh.", style="dim")
    elif line == "/base":
        acts = session.toggle_adapter()
        notes.print("The adapter answers." if acts else "The base answers.", style="dim")
    elif line.startswith("/"):
        notes.print(f"{line} is none of /reset, /base, /quit.", style="dim")
    elif line:
        _say(session, line)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return "/quit"


def _say(session: ChatSession, text: str) -> None:
    for piece in session.stream(text):
        print(piece, end="", flush=True)
    print(flush=True)
