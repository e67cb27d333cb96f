"""One row of a comparison: run its sides in turns, judge them, show and keep the figures."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.case import Case
from harness.flops import step_flops
from harness.machine import Rates, measure_rates
from harness.measurement import Run
from harness.parity import LOSS, NORM, Verdict, judge
from harness.sides.registry import GRAFT
from harness.worker import run_process, run_side
from harness.writer import Example, per_step


@dataclass(frozen=True)
class Row:
    """What is compared with what, and what is wanted of it.

    `peers` are judged against the first of them that ran, and so is ours. `beside` are other runs of ours,
    which compute something else: they are not judged.
    """

    case: Case
    peers: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    speed: float = 0.0
    """At least so many times the tokens/s of the fastest peer, or of `beside[0]` where there is no peer."""
    memory: float = 0.0
    """At most so many times what the smallest peer takes above the weights; 0: nothing is wanted."""
    most_rounds: int = 9
    """Where starting takes long."""
    loss_tolerance: float = LOSS
    norm_tolerance: float = NORM

    @property
    def sides(self) -> tuple[str, ...]:
        return (GRAFT, *self.peers, *self.beside)


@dataclass
class Outcome:
    """The runs of a row, and what the machine could do meanwhile."""

    row: Row
    rates: list[Rates] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    flops: float = 0.0
    """Of a step, the mean over steps."""

    @property
    def rate(self) -> Rates:
        """Medians over the rounds."""
        return Rates(
            statistics.median(rate.matrix for rate in self.rates),
            statistics.median(rate.copy for rate in self.rates),
        )

    @property
    def others(self) -> tuple[str, ...]:
        """The peers that are not ours."""
        return tuple(side for side in self.row.peers if not side.startswith(GRAFT))

    def of(self, side: str) -> list[Run]:
        """Its runs that have figures."""
        return [run for run in self.runs if run.side == side and not run.failed]

    def verdict(self, run: Run) -> Verdict:
        """Whether a run counts."""
        row = self.row
        if run.side in row.beside:
            return judge(run, run)
        judges = [other for side in self.others for other in self.of(side)] or self.of(GRAFT)
        reference = judges[0] if judges else run
        return judge(run, reference, loss=row.loss_tolerance, norm=row.norm_tolerance)

    def counting(self, side: str) -> list[Run]:
        """Its runs that count."""
        return [run for run in self.of(side) if not self.verdict(run).is_void]

    def median(self, side: str, value: Callable[[Run], float]) -> float:
        return statistics.median(value(run) for run in self.of(side))

    def utilisation(self, run: Run) -> float:
        """FLOPs that the tokens need, over what the machine's own matrix rate would do in that time."""
        per_token = self.flops / (sum(run.tokens) / len(run.tokens))
        return run.tokens_per_second * per_token / self.rate.matrix

    def best(self, value: Callable[[Run], float], *, most: bool) -> str:
        """The counting peer with the most or least of something; else the first side beside; else none."""
        peers = [side for side in self.others if self.counting(side)]
        if not peers:
            return next((side for side in self.row.beside if self.of(side)), "")
        return (max if most else min)(peers, key=lambda side: self.median(side, value))

    def ratios(self, side: str, value: Callable[[Run], float]) -> list[float]:
        """Ours over another within each round that both have."""
        mine, its = ({run.round: value(run) for run in self.of(name)} for name in (GRAFT, side))
        return [mine[number] / its[number] for number in sorted(mine.keys() & its.keys()) if its[number]]


def measure(
    row: Row, rounds: int, limit: float, say: Callable[[str], None] = print, *, until: float = math.inf
) -> Outcome:
    """All sides, `rounds` times in turns, the machine's own rates at the head of each round.

    Args:
        limit: seconds for one side.
        until: on the monotonic clock; from then on no side is started.
    """
    found = Outcome(row)
    case, out = row.case, set[str]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_process(["-m", "harness.writer", case.dumps(), str(folder)], f"writing the model of {case.row}")
        found.flops = statistics.mean(example_flops(case, step) for step in per_step(case, folder))
        for number in range(min(rounds, row.most_rounds)):
            found.rates.append(measure_rates(case))
            for side in row.sides:
                left = min(limit, until - time.monotonic())
                if side in out or left <= 0:
                    continue
                run = run_side(case, side, number, folder, left)
                out |= {side} if run.failed else set()
                found.runs.append(run)
                say(_line(case, run))
    return found


def require_valid(outcomes: Sequence[Outcome]) -> None:
    """End with an error if ours failed, or is void, in any row: after all rows are shown and kept.

    Raises:
        SystemExit: with the rows.
    """
    wrong = [
        found.row.case.row
        for found in outcomes
        if any(found.verdict(run).is_void for run in found.runs if run.side == GRAFT)
    ]
    if wrong:
        raise SystemExit(f"void, ours does not count: {', '.join(wrong)}")


def with_rates(found: Outcome) -> Outcome:
    """An outcome of runs made one by one, with the machine's rates and the arithmetic of its case."""
    case = found.row.case
    found.rates.append(measure_rates(case))
    found.flops = step_flops(case, [case.length] * case.rows, case.rows * (case.length - 1))
    return found


def example_flops(case: Case, examples: Sequence[Example]) -> float:
    """Arithmetic of a step over these examples."""
    targets = sum(len(labels) - labels.count(-100) for _, labels in examples)
    return step_flops(case, [len(ids) for ids, _ in examples], targets)


def _line(case: Case, run: Run) -> str:
    head = f"{case.row} {run.round} {run.side:40}"
    if run.failed:
        return f"{head} {run.failed}"
    return (
        f"{head} {run.tokens_per_second:9,.0f} tokens/s, {run.above_weights / 1e6:7,.0f} MB above weights, "
        f"first step {run.first_step:.1f} s, loss {run.losses[-1]:.4f}"
    )


def speed(run: Run) -> float:
    return run.tokens_per_second


def above(run: Run) -> float:
    return float(run.above_weights)


def known_sides(rows: Sequence[Row]) -> tuple[str, ...]:
    """Every side that some row has."""
    return tuple(dict.fromkeys(side for row in rows for side in row.sides))
