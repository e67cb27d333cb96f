"""`graft demo` and `graft tune`: train an adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.errors import interrupted
from graftlm.cli.options import FLAG, Debug, Json, Model, examples
from graftlm.cli.output import finish

_WHAT = "What to train"
_RUN = "The run"
_TYPES = (
    "lora, qlora, dora, ia3, bottleneck, prefix, prompt, adaption_prompt, tokens; "
    "the baselines full, biases, norms."
)

Method = Annotated[str | None, typer.Option("--method", metavar="TYPE", help=_TYPES, rich_help_panel=_WHAT)]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to `app`."""
    app.command(
        "demo",
        epilog=examples(
            ("graft demo", "into a new folder"),
            ("graft demo --out mine", "then open mine/report.html"),
        ),
    )(demo)
    app.command(
        "tune",
        epilog=examples(
            ("graft tune train.jsonl --model sprout", "the embedded base"),
            ("graft tune train.jsonl --model sprout --method ia3", "another method"),
            ("graft tune recipe.yaml --set train.learning_rate=1e-4", "one value changed"),
            ("graft tune runs/a --resume", "after an interruption"),
        ),
    )(tune)


def demo(
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="New folder for the run.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """The whole life of an adapter, offline, in about a minute."""
    from graftlm import api

    try:
        result = api.demo(out)
    except KeyboardInterrupt as stop:
        raise interrupted(stop, fix="graft demo starts it again in a new folder.") from stop
    return finish(result, as_json=as_json)


def tune(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA|RECIPE.yaml", help="Data file, hub name or recipe; to resume, also the run."
        ),
    ],
    model: Model = None,
    method: Method = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="TASK", help="Objective; auto looks at the data.", rich_help_panel=_WHAT
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.FIELD=VALUE",
            help="Change one value of the recipe; may be repeated.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the run.", rich_help_panel=_RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar=FLAG,
            help="Go on from the newest checkpoint of the run.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Check data, train an adapter, evaluate before and after, verify."""
    from graftlm import api

    try:
        result = api.tune(
            source,
            model=model,
            method=method,
            task=task,
            out=out,
            overrides=tuple(assignments or ()),
            resume=resume,
        )
    except KeyboardInterrupt as stop:
        folder = shlex.quote(str(out)) if out else "RUN"
        raise interrupted(stop, fix=f"If {folder} exists: graft tune {folder} --resume") from stop
    return finish(result, as_json=as_json)
