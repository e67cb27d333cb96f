"""QLoRA end to end on a CPU: ours against PEFT + transformers + bitsandbytes, and our own 16-bit LoRA.

    python benchmarks/qlora.py [--rounds 3] [--steps 8] [--recompute]
    python benchmarks/qlora.py --kinds                ours alone, with every kind of quantised base
    python benchmarks/qlora.py --profile              where the time of one of our steps goes

One Llama with random weights (by default 0.17B parameters: hidden 1024, 8 layers, feed-forward 2816, and the
32,000 tokens of Llama 2, so that the logits weigh as they do in practice) is saved once; every side reads it
in a process of its own, the sides take turns, and all start from the same adapter file (rank 16 on every
linear layer) and see the same rows (4 x 512 tokens a step). Ours runs the step of `graft tune`. PEFT runs in
the four ways that people use it in; the best of them counts, for speed and for memory each.

Figures: tokens per second from the median step after two warm-up steps; peak resident memory (VmHWM) of the
whole process and of what came after the imports. A run is void unless loss and gradient norm of every step
agree with the first PEFT side: both hold the same NF4 codes, so only the order and the precision of 16-bit
arithmetic differ. The tolerances are twice to four times what PEFT's sides differ among themselves (6e-5 and
9e-3 over eight steps), and so tight that a base without quantisation fails them (1e-3 and 4e-2).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import results
from harness.case import Case
from harness.measurement import Run
from harness.parity import judge
from harness.sides.registry import BITSANDBYTES_SIDES, GRAFT, GRAFT_DENSE, GRAFT_KINDS
from harness.table import markdown, spread
from harness.worker import run_process, run_side

RESULTS = results.FOLDER / "qlora.csv"
NAMES = {
    GRAFT: "Graft QLoRA",
    GRAFT_DENSE: "Graft LoRA, 16 bits",
    **{side: side for side in GRAFT_KINDS},
    **{side: side.replace(" + bitsandbytes", "") for side in BITSANDBYTES_SIDES},
    "PEFT + bitsandbytes": "PEFT, as loaded",
    "PEFT + bitsandbytes, 16-bit adapters": "PEFT, as loaded, 16-bit adapters",
}
"""What this table calls the sides."""
PEERS = tuple(NAMES[side] for side in BITSANDBYTES_SIDES)
OURS, DENSE = NAMES[GRAFT], NAMES[GRAFT_DENSE]
COLUMNS = ("side", "round", "seconds", "processor", "losses", "norms", "imports", "loaded", "peak")


class Table:
    """Medians over rounds, ratios within a round, as Markdown."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.sides = tuple(dict.fromkeys(run.side for run in runs))

    def __str__(self) -> str:
        heads = ("side", "tokens/s", "processor s per step", "peak MB", "above imports MB", "loading MB")
        lines = [
            (side, f"{self.median(side, speed):,.0f}", f"{self.median(side, processor):.2f}",
             *(f"{self.median(side, value) / 1e6:,.0f}" for value in (peak, used, loading)))
            for side in self.sides
        ]  # fmt: skip
        return markdown(heads, lines)

    def targets(self) -> str:
        """Ours against the best of PEFT's ways, for each figure, and against our own LoRA."""
        fastest = max(PEERS, key=lambda side: self.median(side, speed))
        smallest = min(PEERS, key=lambda side: self.median(side, peak))
        lines = [f"- tokens/s, {OURS} / {side}: {self.ratio(OURS, side, speed)}" for side in PEERS]
        return "\n".join((
            *lines,
            f"- the fastest is {fastest}; target 2",
            f"- peak memory, {OURS} / {smallest}: {self.ratio(OURS, smallest, peak)}; target 0.6; "
            f"above the imports {self.ratio(OURS, smallest, used)}",
            f"- tokens/s, {OURS} / {DENSE}: {self.ratio(OURS, DENSE, speed)}; target 0.85",
        ))  # fmt: skip

    def median(self, side: str, value: Callable[[Run], float]) -> float:
        return statistics.median(value(run) for run in self.runs if run.side == side)

    def ratio(self, side: str, other: str, value: Callable[[Run], float]) -> str:
        """Median of the ratios within a round, with the range."""
        mine, its = ({run.round: value(run) for run in self.runs if run.side == it} for it in (side, other))
        return spread([mine[number] / its[number] for number in mine])


def speed(run: Run) -> float:
    return run.tokens_per_second


def processor(run: Run) -> float:
    return run.processor_seconds


def peak(run: Run) -> float:
    return run.peak


def used(run: Run) -> float:
    return run.peak - run.imports


def loading(run: Run) -> float:
    return run.loaded - run.imports


def require_agreement(runs: Sequence[Run]) -> None:
    """Stop unless every side on the NF4 base has the losses and gradient norms of the first PEFT side."""
    reference = next(run for run in runs if run.side in PEERS)
    for run in (run for run in runs if run.round == reference.round):
        found = judge(run, reference)
        print(f"{run.side:34} against {reference.side}: {found}")
        if run.side != DENSE and found.is_void:
            raise SystemExit("void: the sides do not compute the same")


def keep(runs: Sequence[Run]) -> None:
    """Append the runs to the results, with machine, versions and command."""
    where = {
        "machine": results.machine(threads=len(os.sched_getaffinity(0))),
        "versions": results.versions("torch", "transformers", "peft", "bitsandbytes", "graftlm"),
        "command": results.command(__file__),
        "date": results.today(),
    }
    rows = []
    for run in runs:
        cells = {name: getattr(run, name) for name in COLUMNS}
        lists = {name: results.joined(value) for name, value in cells.items() if isinstance(value, list)}
        rows.append(cells | lists | {"tokens_per_second": round(run.tokens_per_second, 1)} | where)
    results.append(RESULTS, rows)


def measured(case: Case, sides: Sequence[str], rounds: int) -> list[Run]:
    """All sides in turns.

    Raises:
        SystemExit: one of them failed.
    """
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        run_process(["-m", "harness.writer", case.dumps(), scratch], "writing the model")
        for number in range(rounds):
            for side in sides:
                run = run_side(case, side, number, Path(scratch))
                if run.failed:
                    raise SystemExit(f"{NAMES[side]}: {run.failed}")
                run.side = NAMES[side]
                print(f"{number} {run.side:34} {run.tokens_per_second:8.0f} tokens/s, "
                      f"peak {run.peak / 1e6:6.0f} MB, loss {run.losses[-1]:.4f}", flush=True)  # fmt: skip
                runs.append(run)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    for flag, default in (("steps", 8), ("hidden", 1024), ("layers", 8), ("vocabulary", 32000)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing on every side")
    parser.add_argument("--kinds", action="store_true", help="only ours, every kind of quantised base")
    parser.add_argument("--profile", action="store_true", help="only profile our two sides")
    parser.add_argument("--keep", action="store_true", help=f"append the runs to results/{RESULTS.name}")
    given = parser.parse_args()
    shape = f"{given.hidden}x{given.layers}x{given.hidden * 11 // 4}x{given.vocabulary}"
    if given.profile:
        script = [sys.executable, str(Path(__file__).with_name("step_profile.py")), "--shape", shape]
        for kind in ("nf4", "none"):
            subprocess.run([*script, "--quantization", kind, "--top", "25"], check=True)
        return
    case = Case(
        "qlora", shape=shape, steps=given.steps, warm_up=2, rate=given.rate, quantization="nf4",
        recompute="everything" if given.recompute else "auto",
    )  # fmt: skip
    sides = (GRAFT, *GRAFT_KINDS, GRAFT_DENSE) if given.kinds else (GRAFT, *BITSANDBYTES_SIDES, GRAFT_DENSE)
    runs = measured(case, sides, given.rounds)
    found = Table(runs)
    if not given.kinds:
        require_agreement(runs)
    print(found)
    print("" if given.kinds else found.targets())
    if given.keep:
        keep(runs)


if __name__ == "__main__":
    main()
