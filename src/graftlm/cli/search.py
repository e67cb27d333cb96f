"""`graft search`: find the settings of a run by trials."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.errors import interrupted
from graftlm.cli.options import FLAG, Debug, Json, Model, examples
from graftlm.cli.output import finish

_WHAT, _HOW, _RUN = "What to search", "How to search", "The search"

Space = Annotated[
    Path | None,
    typer.Option(
        "--space",
        metavar="FILE",
        help="YAML: section.field with its values, or low and high.",
        rich_help_panel=_WHAT,
    ),
]
Ladder = Annotated[
    bool,
    typer.Option(
        "--ladder",
        metavar=FLAG,
        help="Climb from the smallest method while held-out rows prove a gain.",
        rich_help_panel=_WHAT,
    ),
]
Method = Annotated[
    str | None, typer.Option("--method", metavar="TYPE", help="Of every trial.", rich_help_panel=_WHAT)
]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="Objective; auto looks at the data.", rich_help_panel=_WHAT),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="A value of every trial's recipe; may be repeated.",
        rich_help_panel=_WHAT,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="N|TIME|TOKENS",
        help="24 (trials), 30m, 2h, '2M tokens', or several with commas; default 24.",
        rich_help_panel=_HOW,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="What trials are judged by; auto: what the task is, else the loss.",
        rich_help_panel=_HOW,
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="COST",
        help="parameters (default), memory, seconds or none; may be repeated.",
        rich_help_panel=_HOW,
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option("--sampler", metavar="NAME", help="tpe, random, grid or nsga2.", rich_help_panel=_HOW),
]
Stopping = Annotated[
    str | None,
    typer.Option(
        "--stopping",
        metavar="HOW",
        help="halving: one trial of three goes on at each rung; none: all are trained whole.",
        rich_help_panel=_HOW,
    ),
]
Together = Annotated[
    int | None,
    typer.Option(
        "--together",
        metavar="N",
        help="Trials that train at the same time over the base; as many as pay unless given.",
        rich_help_panel=_HOW,
        min=1,
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        help="Processes that work on the search, this one included.",
        rich_help_panel=_RUN,
        min=1,
    ),
]
On = Annotated[
    str,
    typer.Option(
        "--on", metavar="PLACE", help="Where: processes (of this machine), or ray.", rich_help_panel=_RUN
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of the sampler.", rich_help_panel=_HOW, min=0)
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder of the search.", rich_help_panel=_RUN)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar=FLAG,
        help="Go on with a search, or join one that is running.",
        rich_help_panel=_RUN,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verb of this file to `app`."""
    app.command(
        "search",
        epilog=examples(
            ("graft search train.jsonl --model sprout", "rate, rank, targets"),
            ("graft search train.jsonl --model M --space s.yaml", "your own space"),
            ("graft search train.jsonl --model M --ladder", "the smallest method"),
            ("graft search searches/train-1 --resume", "go on, or help"),
        ),
    )(search)


def search(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA|RECIPE.yaml", help="Data file, hub name or recipe; to resume, the search."
        ),
    ],
    model: Model = None,
    space: Space = None,
    ladder: Ladder = False,
    method: Method = None,
    task: Task = None,
    assignments: Assignments = None,
    budget: Budget = None,
    metric: Metric = None,
    against: Against = None,
    sampler: Sampler = None,
    stopping: Stopping = None,
    together: Together = None,
    seed: Seed = None,
    out: Out = None,
    workers: Workers = 1,
    on: On = "processes",
    resume: Resume = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Search settings within a budget: quality against cost, poor trials stopped early, one loaded base."""
    from graftlm import api

    options: dict[str, object] = {
        "budget": budget,
        "metric": metric,
        "sampler": sampler,
        "stopping": stopping,
        "seed": seed,
    }
    if against is not None:
        options["costs"] = tuple(cost for cost in against if cost != "none")
    try:
        result = api.search(
            source,
            model=model,
            method=method,
            task=task,
            space=space,
            out=out,
            overrides=tuple(assignments or ()),
            resume=resume,
            ladder=ladder or None,
            together=together,
            workers=workers,
            on=on,
            **options,
        )
    except KeyboardInterrupt as stop:
        folder = shlex.quote(str(out)) if out else "SEARCH"
        raise interrupted(stop, fix=f"If {folder} exists: graft search {folder} --resume") from stop
    return finish(result, as_json=as_json)
