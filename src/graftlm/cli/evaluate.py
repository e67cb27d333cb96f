"""`graft eval`: measure an adapter on held-out data."""

from __future__ import annotations

from typing import Annotated

import typer

from graftlm.cli.options import Adapter, Base, Debug, Json, examples
from graftlm.cli.output import finish


def register(app: typer.Typer) -> None:
    """Add the verb of this file to `app`."""
    app.command(
        "eval",
        epilog=examples(
            ("graft eval runs/a --data test.jsonl", "adapter against its base"),
            ("graft eval runs/a --data test.jsonl --against runs/b", "two adapters, row by row"),
        ),
    )(evaluate)


def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Option("--data", metavar="D", help="Rows that were not trained on.")],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="OTHER", help="Adapter or run to compare with; else the base."),
    ] = None,
    base: Base = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="ROWS", min=1, help="Only the first rows.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Held-out metrics with intervals, compared row by row."""
    from graftlm import api

    result = api.evaluate(adapter, data=data, against=against, base=base, limit=limit)
    return finish(result, as_json=as_json)
