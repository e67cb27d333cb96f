"""`graft combine`: several adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import Base, Debug, Json, NewFolder, examples
from graftlm.cli.output import finish
from graftlm.core.errors import UsageError

_SPARSE = "Ways that sparsify"


def register(app: typer.Typer) -> None:
    """Add the verb of this file to `app`."""
    app.command(
        "combine",
        epilog=examples(
            ("graft combine runs/a:0.7 runs/b:0.3 --out ab", "exact sum"),
            ("graft combine runs/a runs/b:-0.5 --out less-b --rank 16", "subtract, cut"),
            ("graft combine runs/a runs/b --out ab --how ties --density 0.3", "elect signs"),
        ),
    )(combine)


def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER:WEIGHT", help="Adapter or run folders, each with a weight (1)."),
    ],
    out: NewFolder,
    how: Annotated[
        str,
        typer.Option(
            "--how", metavar="WAY", help="linear (exact), cat (the same), svd, ties, dare, magnitude."
        ),
    ] = "linear",
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", min=1, help="Cut the result to this rank.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density", metavar="F", help="Fraction of each change to keep; 0.5.", rich_help_panel=_SPARSE
        ),
    ] = None,
    majority_sign: Annotated[
        str | None,
        typer.Option(
            "--majority-sign",
            metavar="NAME",
            help="Election in ties: total (by size) or frequency.",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Of the drops of dare; 0.", rich_help_panel=_SPARSE),
    ] = None,
    base: Base = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Add adapters up to one, each with a weight."""
    from graftlm import api

    result = api.combine(
        _weights(adapters),
        out,
        how=how,
        base=base,
        rank=rank,
        density=density,
        majority_sign=majority_sign,
        seed=seed,
    )
    return finish(result, as_json=as_json)


def _weights(words: list[str]) -> dict[str | Path, float]:
    """`runs/a:0.7` -> folder and weight; without a weight it is 1."""
    found: dict[str | Path, float] = {}
    for word in words:
        name, colon, number = word.rpartition(":")
        if not colon or Path(word).exists():
            name, number = word, "1"
        try:
            weight = float(number)
        except ValueError:
            raise UsageError(
                f"{number!r} in {word!r} is no weight.",
                meaning="What follows the last colon is the weight of the adapter.",
                fix="graft combine A:0.7 B:0.3 --out DIR",
            ) from None
        if name in found:
            raise UsageError(
                f"{name} is given twice.", fix="Give each adapter once, with the sum of its weights."
            )
        found[name] = weight
    return found
