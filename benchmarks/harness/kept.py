"""Rows of a comparison as the results files keep them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.results import read
from harness.sides.registry import GRAFT

VOID = "void"


@dataclass(frozen=True)
class KeptRow:
    """All runs of one row that were kept at one time."""

    runs: tuple[dict[str, str], ...]

    @property
    def first(self) -> dict[str, str]:
        return self.runs[0]

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run["side"] for run in self.runs))

    @property
    def what(self) -> str:
        """The case in words."""
        first = self.first
        tokens = f"{first['rows']} x {first['length']} tokens"
        data = f"real examples in windows of {first['length']}" if first["data"] else tokens
        base = "" if first["quantization"] == "none" else f" on {first['quantization']}"
        return f"{first['method']} of rank {first['rank']}{base}, {first['shape']}, {data}"

    def of(self, side: str) -> list[dict[str, str]]:
        """Runs that have figures."""
        return [run for run in self.runs if run["side"] == side and run["tokens_per_second"]]

    def counting(self, side: str) -> list[dict[str, str]]:
        """Runs that agree with the reference."""
        return [run for run in self.of(side) if not run["agreement"].lower().startswith(VOID)]

    def agreement(self, side: str) -> str:
        """As the table has it: the run that is furthest from the reference."""
        found = [run["agreement"] for run in self.runs if run["side"] == side]
        return next((text for text in found if text.lower().startswith(VOID)), max(found))

    def median(self, side: str, column: str) -> float:
        return statistics.median(float(run[column]) for run in self.of(side))

    def cells(self, side: str, columns: Sequence[str]) -> list[str]:
        """Medians as a table shows them."""
        if not self.of(side):
            return ["" for _ in columns]
        return [_shown(column, self.median(side, column)) for column in columns]

    def best(self, column: str, *, most: bool) -> str:
        """The peer that counts with the most or least of something; none if there is no peer."""
        peers = [side for side in self.sides if not side.startswith(GRAFT) and self.counting(side)]
        return (max if most else min)(peers, key=lambda side: self.median(side, column), default="")

    def ratio(self, side: str, other: str, column: str) -> float | None:
        """Median of the ratios within a round."""
        mine, its = (
            {run["round"]: float(run[column]) for run in self.counting(name)} for name in (side, other)
        )
        found = [mine[number] / its[number] for number in mine.keys() & its.keys() if its[number]]
        return statistics.median(found) if found else None

    def ratio_to_best(self, column: str, *, most: bool) -> float | None:
        """Ours over the best peer."""
        best = self.best(column, most=most)
        return self.ratio(GRAFT, best, column) if best else None


def latest_rows(path: Path) -> dict[str, KeptRow]:
    """By name, in the order of the file: the runs of every row that were kept last, with all our parts on."""
    runs = [run for run in read(path) if not run["without"]]
    last = {run["row"]: (run["date"], run["command"]) for run in runs}
    return {
        name: KeptRow(
            tuple(run for run in runs if run["row"] == name and (run["date"], run["command"]) == when)
        )
        for name, when in last.items()
    }


def _shown(column: str, value: float) -> str:
    if column == "mfu":
        return f"{100 * value:.0f} %"
    if column in ("above_weights", "peak_training"):
        return f"{value / 1e6:,.0f}"
    return f"{value:.1f}" if column == "first_step" else f"{value:,.0f}"
