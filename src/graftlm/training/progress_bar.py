"""Progress for people, on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from graftlm.training.callbacks import Callback, Event
from graftlm.training.time_left import Expected, TimeLeft

MOST_SHOWN = 4
"""Figures of a task that are shown while it runs."""


def progress_display(
    stream: TextIO | None = None, *, line_seconds: float = 10.0, expected: Expected | None = None
) -> Callback:
    """A bar if `stream` (standard error) is a terminal, else one line every `line_seconds`.

    `expected` is what was predicted of the run: time is left from the beginning, and to its very end.
    """
    target, left = sys.stderr if stream is None else stream, TimeLeft(expected)
    return ProgressBar(target, left) if target.isatty() else ProgressLines(target, line_seconds, left)


def figures(fields: Mapping[str, Any]) -> str:
    """The figures of one step event in one line, the task's own ones behind the loss.

    >>> figures({"loss": 1.5, "learning_rate": 2e-4, "tokens_per_second": 1234.5, "memory_bytes": 2**30})
    'loss 1.5000  lr 2.00e-04  1,234 tok/s  1.00 GiB'
    """
    own = shown_metrics(fields)
    return (
        f"loss {fields['loss']:.4f}  {own}{'  ' if own else ''}lr {fields['learning_rate']:.2e}  "
        f"{fields['tokens_per_second']:,.0f} tok/s  {fields['memory_bytes'] / 2**30:.2f} GiB"
    )


def shown_metrics(fields: Mapping[str, Any]) -> str:
    """The first of the task's own figures in an event, as the line has room for; all are in the log.

    >>> shown_metrics({"metrics": {"rewards/accuracies": 0.75, "kl": 0.01}})
    'rewards/accuracies 0.75  kl 0.01'
    """
    found = fields.get("metrics") or {}
    return "  ".join(f"{name} {value:.4g}" for name, value in list(found.items())[:MOST_SHOWN])


def message(event: Event) -> str | None:
    """The line that events other than steps deserve, if any."""
    fields = event.fields
    match event.kind:
        case "evaluate":
            own = shown_metrics(fields)
            figures = f"held-out loss {fields['loss']:.4f}{'  ' if own else ''}{own}"
            return f"step {fields['step']}: {figures} ({fields['rows']} rows)"
        case "skipped":
            return f"step {fields['step']} skipped: {fields['why']} (rows {_short(fields['rows'])})"
        case "notice":
            return str(fields["text"])
        case "finding":
            what = f"{fields['severity']} {fields['rule']} at step {fields['step']}"
            return f"{what}: {fields['seen']} {fields['fix']}"
        case "interrupted":
            return f"stopped at step {fields['step']}; go on with --resume"
        case "start" if fields["start_step"]:
            return f"resuming after step {fields['start_step']} of {fields['total_steps']}"
        case _:
            return None


def _short(rows: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return f"{shown}, ..." if len(rows) > 8 else shown


class ProgressBar:
    """Live bar: steps, loss, rate, tokens per second, memory, time left."""

    def __init__(self, stream: TextIO, left: TimeLeft) -> None:
        self._left = left
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TextColumn("{task.fields[left]}"),
            console=Console(file=stream),
        )
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        self._left(event)
        left = self._left.text
        if event.kind == "start":
            total, done = event.fields["total_steps"], event.fields["start_step"]
            self._task = self._bar.add_task("step", total=total, completed=done, figures="", left=left)
            self._bar.start()
        elif event.kind == "step" and self._task is not None:
            done = event.fields["step"]
            self._bar.update(self._task, completed=done, figures=figures(event.fields), left=left)
        text = message(event)
        if text:
            self._bar.console.print(text, highlight=False, markup=False)
        if event.kind == "end":
            self._bar.stop()


class ProgressLines:
    """Plain lines for log files: the first step, then one every `seconds`, and the last."""

    def __init__(self, stream: TextIO, seconds: float, left: TimeLeft) -> None:
        self._stream = stream
        self._seconds = seconds
        self._left = left
        self._total = 0
        self._shown_at = -float("inf")

    def __call__(self, event: Event) -> None:
        self._left(event)
        if event.kind == "start":
            self._total = event.fields["total_steps"]
        text = message(event)
        if event.kind == "step":
            text = self._step(event.fields)
        if text:
            print(text, file=self._stream, flush=True)

    def _step(self, fields: Mapping[str, Any]) -> str | None:
        now = time.monotonic()
        if now - self._shown_at < self._seconds and fields["step"] != self._total:
            return None
        self._shown_at = now
        left = self._left.seconds or 0.0
        return f"step {fields['step']}/{self._total}  {figures(fields)}  about {left:,.0f} s left"
