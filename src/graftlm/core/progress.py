"""A bar for work that is not training: on standard error, on a terminal only, gone when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_LARGE = 100_000_000
"""Bytes that take long enough to read for a bar."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with (done, total)."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def loading(name: str) -> Iterator[Callable[[int, int], None]]:
    """The same in bytes, for a base that is quantised while it is read."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"quantising {name}", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=total > _LARGE)


def say(text: str) -> None:
    """One line about what the verb is doing, on standard error."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)
