"""What verbs print: results for people on standard output, or one JSON line for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Result(Protocol):
    """What the functions of `graftlm.api` return, as far as printing needs it."""

    @property
    def passed(self) -> bool: ...

    @property
    def verdict(self) -> str: ...

    @property
    def lines(self) -> tuple[str, ...]: ...

    def as_dict(self) -> dict[str, Any]: ...


def console(*, stderr: bool = False) -> Console:
    """A rich console; colour only on a terminal, text is never taken for markup."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Mapping[str, Any]) -> None:
    """One line of strict JSON; numbers that JSON lacks (NaN, infinities) become null."""
    print(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False), flush=True)


def finish(result: Result, *, as_json: bool) -> int:
    """Print a result and return the exit code: 0, or 1 if its gate said no."""
    if as_json:
        print_json(result.as_dict())
    else:
        _print_result(result)
    return 0 if result.passed else 1


def _print_result(result: Result) -> None:
    """A tick, a name, numbers and a path per line (`Name: numbers -> path`), then the verdict."""
    from rich.text import Text

    target = console()
    tick, cross, arrow = ("ok", "NO", "->") if target.options.ascii_only else ("✓", "✗", "→")
    names = [line.partition(": ")[0] for line in result.lines if ": " in line]
    width = max(map(len, names), default=0)
    for line in result.lines:
        name, separator, rest = line.partition(": ")
        numbers, found, path = rest.partition(" -> ")
        text = Text.assemble((tick, "green"), " ")
        if separator:
            text.append(name.ljust(width), style="bold").append(f"  {numbers}")
        else:
            text.append(line)
        if found:
            text.append(f" {arrow} ", style="dim").append(path, style="cyan")
        target.print(text)
    mark = Text(tick, "bold green") if result.passed else Text(cross, "bold red")
    target.print(mark.append(f" {result.verdict}", style="bold"))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
