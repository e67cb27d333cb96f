"""What `graft plan` says: a choice and what it was made for, in lines for people and figures for machines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.planning.amounts import in_count, in_gib, in_time
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.fitting import BATCH
from graftlm.planning.option import Choice, Option
from graftlm.planning.requirements import Requirements
from graftlm.planning.rows import RowLengths
from graftlm.training.recipe import Recipe


@dataclass(frozen=True)
class Line:
    """One option, as a table shows it."""

    label: str
    memory: str
    time: str
    cost: str
    trainable: str
    gain: str
    """Of the gain of full fine-tuning."""
    runs_as: str


@dataclass(frozen=True)
class PlanReport:
    """A choice, and what it was made for."""

    recipe: Recipe
    """As it was asked for, with the task that was told."""
    task: str
    task_why: str
    facts: BaseFacts
    rows: RowLengths
    requirements: Requirements
    choice: Choice
    recipe_file: Path | None = None
    """Where the best recipe was written."""
    picture_file: Path | None = None

    @property
    def heading(self) -> tuple[tuple[str, str], ...]:
        """What was planned for: name and value."""
        facts, rows, machine = self.facts, self.rows, self.choice.machine
        about = "" if rows.is_counted else "about "
        return (
            ("base", f"{facts.name}, {in_count(facts.total)} parameters ({facts.source})"),
            ("data", f"{self.recipe.data.path}: {len(rows.train):,} rows to train on, {about}"
                     f"{in_count(rows.tokens)} tokens, {len(rows.held_out):,} held out"),
            ("task", f"{self.task} ({self.task_why})"),
            ("machine", f"{machine.name}, {in_gib(machine.memory_bytes)} ({machine.source})"),
            *((("wanted", ", ".join(self.requirements.in_words)),) if self.requirements.in_words else ()),
        )  # fmt: skip

    @property
    def lines(self) -> tuple[Line, ...]:
        """Every option, the best first."""
        return tuple(map(_line, self.choice.options))

    @property
    def shown(self) -> tuple[Line, ...]:
        """The best way of each method, and the one that takes the least memory."""
        return tuple(map(_line, self.shown_options))

    @property
    def shown_options(self) -> tuple[Option, ...]:
        """The same, whole."""
        options = self.choice.options
        first = {option.candidate.name: option for option in reversed(options)}
        least = min(options, key=lambda option: option.fit.memory.peak, default=None)
        return tuple(each for each in options if each is first[each.candidate.name] or each is least)

    @property
    def reasons(self) -> tuple[str, ...]:
        """For the best option."""
        return self.choice.best.reasons if self.choice.best else ()

    @property
    def turned_down(self) -> tuple[str, ...]:
        """What is not possible, why, and what would change that."""
        return tuple(
            f"{item.label}: {item.why}{f' Possible with {item.remedy}.' if item.remedy else ''}"
            for item in self.choice.rejected
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the figures come from."""
        return self.choice.notes

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Commands that go on from here, and what was written."""
        best = self.choice.best
        drawn = () if self.picture_file is None else (f"The picture is {self.picture_file}",)
        if best is None:
            return ()
        if self.recipe_file is not None:
            return (f"graft tune {shlex.quote(str(self.recipe_file))}", *drawn)
        return (" ".join(["graft tune", shlex.quote(self.recipe.data.path), *_arguments(best)]), *drawn)

    @property
    def ok(self) -> bool:
        """Whether anything keeps the limits."""
        return self.choice.best is not None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rows = self.rows
        return {
            "ok": self.ok,
            "base": self.facts.as_dict(),
            "data": {
                "path": self.recipe.data.path,
                "train_rows": len(rows.train),
                "held_out_rows": len(rows.held_out),
                "train_tokens": rows.tokens,
                "is_counted": rows.is_counted,
            },
            "task": self.task,
            "task_why": self.task_why,
            "requirements": self.requirements.as_dict(),
            **self.choice.as_dict(),
            "recipe_file": self.recipe_file,
            "picture_file": self.picture_file,
        }


def _line(option: Option) -> Line:
    train = option.fit.effective.train
    size, passes = (getattr(train, name) for name in BATCH)
    recomputes = "" if option.fit.recompute == "nothing" else f", recomputes {option.fit.recompute}"
    return Line(
        label=option.label,
        memory=in_gib(option.fit.memory.peak),
        time=in_time(option.fit.time.seconds),
        cost="" if option.cost is None else f"{option.cost:.2f}",
        trainable=in_count(option.trainable),
        gain=option.candidate.standing.quality.text,
        runs_as=f"{size} x {passes} per step{recomputes}",
    )


def _arguments(option: Option) -> Iterator[str]:
    """Options of `graft tune` that give the same run."""
    yield from ("--model", shlex.quote(option.recipe.model.name))
    for section, fields in option.candidate.changes.items():
        for name, value in fields.items():
            if (section, name) == ("method", "type"):
                yield f"--method {value}"
            else:
                yield f"--set {section}.{name}={str(value).lower() if isinstance(value, bool) else value}"
