"""`graft check`: look at data before training on it."""

from __future__ import annotations

from typing import Annotated

import typer

from graftlm.cli.options import Debug, Json, Model, examples
from graftlm.cli.output import console, print_json

_READ = "How to read the data"

Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="NAME",
        help="What is to be learnt; auto tells it from the data.",
        rich_help_panel=_READ,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="task.FIELD=VALUE",
        help="A setting of the task, such as its labels; repeatable.",
        rich_help_panel=_READ,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        metavar="TOKENS",
        min=8,
        help="Training window; 1024 unless given.",
        rich_help_panel=_READ,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format", metavar="NAME", help="Format of the rows; auto detects it.", rich_help_panel=_READ
    ),
]
Template = Annotated[
    str,
    typer.Option(
        "--template",
        metavar="NAME",
        help="Chat template; auto takes the tokenizer's.",
        rich_help_panel=_READ,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verb of this file to `app`."""
    app.command(
        "check",
        epilog=examples(
            ("graft check train.jsonl", "problems, lengths"),
            ("graft check train.jsonl --model Qwen/Qwen3-0.6B", "that model's tokens"),
            ("graft check pairs.jsonl --task dpo", "as a task reads it"),
            ("graft check train.csv --json", "for scripts"),
        ),
    )(check)


def check(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="JSONL, JSON, CSV, Parquet or text file, or hub name.")
    ],
    model: Model = None,
    task: Task = "auto",
    overrides: Settings = None,
    max_length: MaxLength = None,
    format: Format = "auto",
    template: Template = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Show what is in data, its problems, and what would be trained on."""
    from graftlm import api

    report = api.check(
        data,
        model=model,
        max_length=max_length,
        format=format,
        template=template,
        task=task,
        overrides=overrides or (),
    )
    if as_json:
        print_json(report.as_dict())
    elif isinstance(report, api.TaskReport):
        from graftlm.cli.show_task_check import render_task_check

        render_task_check(report, console())
    else:
        from graftlm.cli.show_check import render_check

        render_check(report, console())
    return 0 if report.ok else 1
