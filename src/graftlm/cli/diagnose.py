"""`graft diagnose`: what went wrong with a run or an adapter, and what fixes it."""

from __future__ import annotations

from typing import Annotated

import typer

from graftlm.cli.options import FLAG, Base, Debug, Json, examples
from graftlm.cli.output import console, print_json


def register(app: typer.Typer) -> None:
    """Add the verb of this file to `app`."""
    app.command(
        "diagnose",
        epilog=examples(
            ("graft diagnose runs/a", "also of a run that failed"),
            ("graft diagnose runs/a --deep", "load and try it too"),
            ("graft diagnose adapter --base M", "one from elsewhere"),
        ),
    )(diagnose)


def diagnose(
    reference: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="Run folder, adapter folder or merged model.")
    ],
    base: Base = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="D", help="What an adapter from elsewhere was trained on."),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", metavar=FLAG, help="Load base and adapter, and look at what they do."),
    ] = False,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="RUN", help="What a merged model was made of.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--beside", metavar="RUN", help="Another adapter served with this one; repeatable."),
    ] = None,
    served: Annotated[
        str | None,
        typer.Option("--served", metavar="URL", help="The server of these adapters, to be asked too."),
    ] = None,
    safety: Annotated[
        str | None,
        typer.Option("--safety", metavar="FILE", help="Prompts with a label (safe, unsafe) to be asked."),
    ] = None,
    known: Annotated[
        str | None, typer.Option("--known", metavar="FILE", help="Text that the base should still know.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Name known failures, with evidence and the command that fixes each."""
    from graftlm import api

    found = api.diagnose(
        reference,
        base=base,
        data=data,
        deep=deep,
        adapter=adapter,
        beside=beside or (),
        served=served,
        safety=safety,
        known=known,
    )
    if as_json:
        print_json(found.as_dict())
    else:
        from graftlm.cli.show_diagnosis import render_diagnosis

        render_diagnosis(found, console())
    return 0 if found.passed else 1
