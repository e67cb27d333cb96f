"""`graft plan`: what a run will take, and which recipe suits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import FLAG, Debug, Json, Model, examples
from graftlm.cli.output import console, print_json

_WHAT = "What is fixed"
_WANTED = "What is wanted"
_MACHINE = "The machine"

Deadline = Annotated[
    str | None,
    typer.Option("--deadline", metavar="TIME", help="Over by then: 2h, 90m.", rich_help_panel=_WANTED),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget", metavar="AMOUNT", help="At most this, at --price-per-hour.", rich_help_panel=_WANTED
    ),
]
LatencyCritical = Annotated[
    bool,
    typer.Option(
        "--latency-critical", metavar=FLAG, help="Answers may not take longer.", rich_help_panel=_WANTED
    ),
]
Tasks = Annotated[
    int,
    typer.Option("--tasks", metavar="N", min=1, help="Tasks that share the base.", rich_help_panel=_WANTED),
]
QualityFirst = Annotated[
    bool,
    typer.Option("--quality-first", metavar=FLAG, help="The best result that fits.", rich_help_panel=_WANTED),
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="A card, such as rtx4090.", rich_help_panel=_MACHINE),
]
GpuMemory = Annotated[
    str | None,
    typer.Option("--gpu-memory", metavar="SIZE", help="A card with 24GB.", rich_help_panel=_MACHINE),
]
MachineFile = Annotated[
    Path | None,
    typer.Option("--machine", metavar="FILE", help="A machine in YAML.", rich_help_panel=_MACHINE),
]
Price = Annotated[
    float | None,
    typer.Option("--price-per-hour", metavar="AMOUNT", help="Of the machine.", rich_help_panel=_MACHINE),
]
Method = Annotated[
    str | None,
    typer.Option("--method", metavar="TYPE", help="Only this method.", rich_help_panel=_WHAT),
]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="Objective; auto looks at the data.", rich_help_panel=_WHAT),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.FIELD=VALUE", help="One value of the recipe; may be repeated.",
        rich_help_panel=_WHAT,
    ),
]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the verb of this file to `app`."""
    app.command(
        "plan",
        epilog=examples(
            ("graft plan train.jsonl --model sprout", "on this machine"),
            ("graft plan train.jsonl --model M --gpu rtx4090", "on another one"),
            ("graft plan train.jsonl --model M --deadline 2h", "with a limit"),
            ("graft plan train.jsonl --model M --recipe best.yaml", "for graft tune"),
        ),
    )(plan)


def plan(
    source: Annotated[str, typer.Argument(metavar="DATA|RECIPE.yaml", help="Data file, hub name or recipe.")],
    model: Model = None,
    method: Method = None,
    task: Task = None,
    assignments: Assignments = None,
    deadline: Deadline = None,
    budget: Budget = None,
    latency_critical: LatencyCritical = False,
    tasks: Tasks = 1,
    quality_first: QualityFirst = False,
    gpu: Gpu = None,
    gpu_memory: GpuMemory = None,
    machine: MachineFile = None,
    price_per_hour: Price = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Write the best recipe there.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw the memory: .svg, .html or .png."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", metavar=FLAG, help="Correct the time of the first by real steps."),
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", metavar=FLAG, help="Show every option.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Rank methods by memory, time and what they promise; starts nothing."""
    from graftlm import api

    report = api.plan(
        source,
        model=model,
        method=method,
        task=task,
        overrides=tuple(assignments or ()),
        deadline=deadline,
        budget=budget,
        latency_critical=latency_critical,
        tasks=tasks,
        quality_first=quality_first,
        gpu=gpu,
        gpu_memory=gpu_memory,
        machine=machine,
        price_per_hour=price_per_hour,
        recipe_file=recipe,
        picture_file=picture,
        calibrate=calibrate,
    )
    if as_json:
        print_json(report.as_dict())
    else:
        from graftlm.cli.show_plan import render_plan

        render_plan(report, console(), show_all=show_all)
    return 0 if report.ok else 1
