"""How time and memory of a step grow with length, batch, rank, attached adapters and model size.

    python benchmarks/growth.py                         ours, every curve; about ten minutes on two cores
    python benchmarks/growth.py --curves length rank    these curves
    python benchmarks/growth.py --sides PEFT            and a peer's curve beside ours
    python benchmarks/growth.py --draw                  only fit and draw what was kept so far

Each point is a run of its own (random weights, LoRA on every linear layer). Arithmetic grows with the square
of the length in attention and is linear in everything else, so the time of a step is fitted by a straight
line over its arithmetic (harness/flops.py), and memory above the weights by one over the axis itself; the
largest relative distance of a point from its line is printed. Attached adapters that are not active must cost
no time. Figures go to docs/results/figures/growth-*.svg.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import results
from harness.case import Case
from harness.fit import Line, fit
from harness.flops import step_flops
from harness.measurement import Run
from harness.plot import FIGURES, Panel, draw_curves
from harness.sides.registry import GRAFT, SIDES
from harness.table import markdown
from harness.worker import run_process, run_side

RESULTS = results.FOLDER / "growth.csv"
BASE = Case("growth", shape="0.05b", steps=4, warm_up=1)


@dataclass(frozen=True)
class Curve:
    """An axis, and the cases along it."""

    axis: str
    field: str
    values: tuple[Any, ...]
    case: Case = BASE

    def at(self, value: Any) -> Case:
        return self.case.but(row=f"growth-{self.field}", **{self.field: value})

    def x(self, value: Any) -> float:
        """Where a value stands on the axis."""
        return self.at(value).model.parameters / 1e6 if self.field == "shape" else float(value)


CURVES = {
    "length": Curve("tokens of one row", "length", (512, 1024, 2048, 4096, 8192), BASE.but(rows=1)),
    "batch": Curve("rows of 512 tokens", "rows", (1, 2, 4, 8, 16)),
    "rank": Curve("rank", "rank", (4, 8, 16, 32, 64, 128, 256)),
    "adapters": Curve("attached adapters, one of them trained", "adapters", (1, 2, 4, 8)),
    "active": Curve(
        "active adapters of eight, one of them trained", "active", (1, 2, 4, 8), BASE.but(adapters=8)
    ),
    "model": Curve("million parameters", "shape", ("0.02b", "0.05b", "0.13b", "0.17b", "0.5b")),
}


def measure(
    name: str, sides: Sequence[str], rounds: int, points: int, changes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The first `points` of a curve, sides in turns."""
    curve, found = CURVES[name], []
    for value in curve.values[:points]:
        case = curve.at(value).but(**{key: each for key, each in changes.items() if key != curve.field})
        with tempfile.TemporaryDirectory() as scratch:
            run_process(["-m", "harness.writer", case.dumps(), scratch], f"writing the model of {case.row}")
            runs = [run_side(case, side, number, Path(scratch)) for number in range(rounds) for side in sides]
        for run in runs:
            print(f"{name} {value!s:>6} {run.side}: {shown(run)}", flush=True)
            if not run.failed:
                found.append(record(name, curve.x(value), case, run))
    return found


def shown(run: Run) -> str:
    """One line."""
    if run.failed:
        return run.failed
    return f"{run.tokens_per_second:,.0f} tokens/s, {run.above_weights / 1e6:,.0f} MB above the weights"


def record(name: str, x: float, case: Case, run: Run) -> dict[str, Any]:
    """One row of the results."""
    tokens = case.rows * case.length
    return {
        "curve": name, "x": x, "side": run.side, "round": run.round, "shape": case.shape, "rows": case.rows,
        "length": case.length, "rank": case.rank, "adapters": case.adapters,
        "seconds": statistics.median(run.seconds[run.warm_up :]),
        "tokens_per_second": round(run.tokens_per_second, 1),
        "flops": f"{step_flops(case, [case.length] * case.rows, tokens - case.rows):.6g}",
        "above_weights": run.above_weights, "peak_training": run.peak_training, "note": run.note,
    }  # fmt: skip


Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """One side along one curve."""

    side: str
    times: Points
    """x, and seconds of a step."""
    memory: Points
    """x, and MB above the weights."""
    by_work: Line
    """Seconds over the arithmetic in TFLOP."""
    by_axis: Line
    """MB over x."""


def along(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """Every side of a curve that has at least two points."""
    mine = [row for row in rows if row["curve"] == name]
    found = []
    for side in dict.fromkeys(row["side"] for row in mine):
        points = medians([row for row in mine if row["side"] == side])
        if len(points) >= 2:
            times = [(x, seconds) for x, (_, seconds, _) in points.items()]
            memory = [(x, size / 1e6) for x, (_, _, size) in points.items()]
            work = fit([(flops / 1e12, seconds) for flops, seconds, _ in points.values()])
            found.append(Measured(side, times, memory, work, fit(memory)))
    return found


def fits(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the straight lines of every curve, and how far a point is from them."""
    heads = (
        "curve",
        "side",
        "points",
        "time",
        "furthest point",
        "memory above the weights",
        "furthest point",
    )
    lines = []
    for name in CURVES:
        for each in along(name, rows):
            time, memory = each.by_work, each.by_axis
            lines.append((
                name, each.side, " ".join(f"{x:g}" for x, _ in each.times),
                f"{1e3 * time.start:.0f} ms + {time.slope:.3f} s per TFLOP", f"{100 * time.deviation:.0f} %",
                f"{memory.start:,.0f} MB + {memory.slope:,.3g} x", f"{100 * memory.deviation:.0f} %",
            ))  # fmt: skip
    return markdown(heads, lines)


def draw(rows: Sequence[Mapping[str, Any]]) -> None:
    """A figure of every curve, with the straight line of its memory."""
    for name, curve in CURVES.items():
        found = along(name, rows)
        if found:
            times = {each.side: each.times for each in found}
            memory = {each.side: each.memory for each in found}
            lines = {
                f"{each.side}, straight line": [(x, each.by_axis.at(x)) for x, _ in each.memory]
                for each in found
            }
            panels = [
                Panel("time of a step", curve.axis, "seconds", times),
                Panel("memory above the weights", curve.axis, "MB", memory, lines),
            ]
            draw_curves(FIGURES / f"growth-{name}.svg", panels)


def medians(rows: Sequence[Mapping[str, Any]]) -> dict[float, tuple[float, float, float]]:
    """By x: FLOPs, seconds and bytes, the medians over rounds."""
    found = {}
    for x in sorted({float(row["x"]) for row in rows}):
        here = [row for row in rows if float(row["x"]) == x]
        found[x] = (
            float(here[0]["flops"]),
            statistics.median(float(row["seconds"]) for row in here),
            statistics.median(float(row["above_weights"]) for row in here),
        )
    return found


def latest(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of each curve and side that were kept last: by the same command on the same day."""
    last = {(row["curve"], row["side"]): (row["command"], row["date"]) for row in rows}
    return [row for row in rows if last[row["curve"], row["side"]] == (row["command"], row["date"])]


def main() -> None:
    given = arguments()
    if given.draw:
        kept = latest(results.read(RESULTS))
        print(fits(kept))
        draw(kept)
        return
    changes = {
        name: getattr(given, name)
        for name in ("steps", "recompute", "shape")
        if getattr(given, name) is not None
    }
    where = results.where(__file__, "torch", "transformers", "peft", "graftlm")
    rows: list[dict[str, Any]] = []
    for name in given.curves:
        found = measure(name, (GRAFT, *given.sides), given.rounds, given.points, changes)
        rows += found
        if given.keep:
            results.append(RESULTS, [row | where for row in found])
    print(fits(rows))
    if given.keep:
        draw(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=(), metavar="SIDE")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of each point")
    parser.add_argument("--shape", help="of every curve but that over shapes; see tuning.py")
    parser.add_argument("--points", type=int, default=9, help="so many of each curve, from the least on")
    parser.add_argument("--recompute", help="a policy of train.recompute")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    parser.add_argument("--draw", action="store_true", help="only draw what was kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
