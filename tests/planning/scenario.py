"""Written scenarios of plans, and the pages that people review.

`python tests/planning/scenario.py` writes all pages anew, with numbers behind it those that begin so.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from graftlm.core.config import Config, build, read_yaml
from graftlm.models.base_kind import kind_of
from graftlm.models.ending import TEXT
from graftlm.planning.base_facts import base_facts
from graftlm.planning.choice import choose
from graftlm.planning.hardware import described, read_machine
from graftlm.planning.machine import Machine
from graftlm.planning.requirements import Requirements
from graftlm.planning.rows import RowLengths
from graftlm.planning.written import recipe_text
from graftlm.training.recipe import make_recipe
from graftlm.verbs.plan_report import Line, PlanReport

FOLDER = Path(__file__).parent / "scenarios"
SEED = 7
HELD_OUT = 0.1
SPREAD = 0.5
"""Deviation of the logarithm of a row's length, as in sets that people wrote."""


class Rows(Config):
    """Lengths in tokens: medians."""

    count: int
    prompt: int
    answer: int


class Place(Config):
    """A machine as the command line describes it."""

    gpu: str | None = None
    gpu_memory: str | None = None
    file: str | None = None
    price_per_hour: float | None = None


class Wanted(Config):
    """The requirements."""

    deadline_seconds: float | None = None
    budget: float | None = None
    is_latency_critical: bool = False
    tasks: int = 1
    is_quality_first: bool = False


class Scenario(Config):
    """One file of the folder."""

    title: str
    base: str
    machine: Place
    rows: Rows
    wanted: Wanted = Wanted()
    recipe: dict[str, Any] = Field(default_factory=dict)


def scenarios() -> list[Path]:
    """Their files, in order."""
    return sorted(FOLDER.glob("*.yaml"))


def planned(path: Path) -> PlanReport:
    """What Graft chooses, from the models of memory and time alone."""
    scenario = build(Scenario, read_yaml(path), source=path.name)
    data = {"path": "data.jsonl", **scenario.recipe.get("data", {})}
    recipe = make_recipe({**scenario.recipe, "model": scenario.base, "data": data})
    facts = base_facts(scenario.base, TEXT)
    rows, wanted = lengths(scenario.rows), Requirements(**scenario.wanted.model_dump())
    choice = choose(recipe, wanted, facts, rows, place(scenario.machine, path.parent))
    kind = kind_of(facts.config)
    task = scenario.recipe.get("task", "sft")
    return PlanReport(recipe, task, f"the base is {kind}", facts, rows, wanted, choice)


def lengths(rows: Rows) -> RowLengths:
    """Lengths that scatter around the medians; the same at every call."""
    draw = random.Random(SEED)
    pairs = [
        (
            round(rows.prompt * draw.lognormvariate(0, SPREAD)),
            round(rows.answer * draw.lognormvariate(0, SPREAD)),
        )
        for _ in range(rows.count)
    ]
    held_out = min(max(30, round(HELD_OUT * rows.count)), rows.count // 2)
    train, rest = pairs[held_out:], pairs[:held_out]
    return RowLengths(
        tuple(max(2, sum(pair)) for pair in train),
        tuple(max(1, pair[1]) for pair in train),
        tuple(max(2, sum(pair)) for pair in rest),
    )


def place(machine: Place, folder: Path) -> Machine:
    """The machine that a scenario describes."""
    if machine.file is not None:
        found = read_machine(folder / machine.file)
    else:
        found = described(gpu=machine.gpu, memory=machine.gpu_memory)
    return found if machine.price_per_hour is None else replace(found, price_per_hour=machine.price_per_hour)


def page(path: Path) -> str:
    """What a person reads: the question, the options, the recipe and its reasons, what was turned down."""
    scenario = build(Scenario, read_yaml(path), source=path.name)
    return "\n".join([f"# {scenario.title}", "", *_lines(planned(path))]) + "\n"


def _lines(report: PlanReport) -> Iterator[str]:
    for name, value in report.heading:
        yield f"- {name}: {value}"
    yield ""
    if report.ok:
        yield from _table(report.shown)
        yield from _list(f"Why {report.lines[0].label}", report.reasons)
    else:
        yield "**Nothing fits.**"
    yield from _list("Not possible", report.turned_down)
    yield from _list("Notes", report.notes)
    best = report.choice.best
    if best is not None:
        yield from ("", "## The recipe", "", "```yaml", recipe_text(best.recipe).rstrip(), "```")


def _table(lines: tuple[Line, ...]) -> Iterator[str]:
    yield "| | option | memory | time | cost | trained | gain of full | runs as |"
    yield "|---|---|---|---|---|---|---|---|"
    for number, line in enumerate(lines, 1):
        cells = (
            line.label,
            line.memory,
            line.time,
            line.cost or "-",
            line.trainable,
            line.gain,
            line.runs_as,
        )
        yield f"| {number} | {' | '.join(cells)} |"


def _list(title: str, items: tuple[str, ...]) -> Iterator[str]:
    if items:
        yield from ("", f"## {title}", "")
    for item in items:
        yield f"- {item}"


def main(wanted: list[str]) -> None:
    """Write the pages whose names begin with one of the words, or all."""
    for path in scenarios():
        if not wanted or path.name.startswith(tuple(wanted)):
            target = path.with_suffix(".md")
            target.write_text(page(path), encoding="utf-8")
            print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
