"""Adapters that train side by side over one base, beside the same runs one after the other.

    python benchmarks/stacked.py [--bases tiny 0.02b] [--tokens 128 512] [--together 2 4 8] [--keep]

Both sides are whole runs: batches, forward, backward, clipping, update, log. What is compared is the median
time of a step, over all runs. The weights of the first member are compared with those of its run alone.
`--keep` appends rows to results/stacked.csv.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import results
from harness.shapes import SHAPES
from torch import Tensor
from transformers import AutoModelForCausalLM

from graftlm.core.allocation import freed_memory_kept
from graftlm.core.seeding import seed_everything
from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.sft import SftObjective
from graftlm.training.loop import train
from graftlm.training.stacked import train_together
from graftlm.training.stacked_member import Member
from graftlm.training.train_section import TrainSection

ROW = 64
"""Tokens of a row; a third of them have a label."""
FILE = results.FOLDER / "stacked.csv"


@dataclass
class Clock:
    """Wall and processor time at the end of each step of a run."""

    wall: list[float]
    cpu: list[float]

    def __call__(self, event: Any) -> None:
        if event.kind == "step":
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())


def rows_of(base: Any, count: int) -> list[Encoded]:
    """Random rows."""
    draw, vocabulary = random.Random(3), int(base.config.vocab_size)
    found = []
    for row in range(1, count + 1):
        ids = tuple(draw.randrange(3, vocabulary) for _ in range(ROW))
        found.append(Encoded(ids, tuple([-100] * (ROW - ROW // 3) + list(ids[ROW - ROW // 3 :])), row, False))
    return found


def settings(number: int, steps: int) -> TrainSection:
    """Of the run with that number: rates and seeds differ, and one step follows each micro-batch."""
    return TrainSection(
        max_steps=steps, learning_rate=1e-4 * (1 + number), gradient_accumulation_steps=1, seed=number,
        save_steps=10_000, eval_steps=10_000,
    )  # fmt: skip


def config(number: int) -> LoraConfig:
    """Ranks and scales differ, as in a search."""
    rank = (8, 16, 4, 32)[number % 4]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05 * (number % 3))


class Case:
    """One base and one size of micro-batch."""

    def __init__(self, base: Any, tokens: int, steps: int) -> None:
        self.base, self.tokens, self.steps = base, tokens, steps
        self.rows = rows_of(base, 4 * max(1, tokens // ROW))

    def batches(self, number: int) -> Batches:
        """Of the run with that number."""
        per_batch = max(1, self.tokens // ROW)
        return Batches(
            self.rows, rows_per_batch=per_batch, max_length=ROW, packing=True, seed=number, pad_token_id=0
        )

    def attached(self, number: int, name: str) -> AdapterSet:
        """The adapter of a run, at its start."""
        seed_everything(number)
        return attach(self.base, config(number), name, storage=FOLDER)

    def alone(self, number: int) -> tuple[Clock, dict[str, Tensor]]:
        """One run by itself."""
        adapters, clock = self.attached(number, "default"), Clock([], [])
        parameters = adapters.named_parameters("default")
        with tempfile.TemporaryDirectory() as run, freed_memory_kept(), fused(fusable(self.base)):
            train(
                self.base, SftObjective(self.base), self.batches(number), parameters,
                settings(number, self.steps), run=Path(run), callbacks=[clock],
            )  # fmt: skip
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        adapters.detach()
        return clock, weights

    def together(self, count: int) -> tuple[Clock, dict[str, Tensor]]:
        """That many runs side by side; the times and weights of the first."""
        sets = [self.attached(number, f"run{number}") for number in range(count)]
        adapters, clock = sets[0], Clock([], [])
        with tempfile.TemporaryDirectory() as folder:
            members = [
                Member(
                    f"run{number}", self.batches(number), adapters.named_parameters(f"run{number}"),
                    settings(number, self.steps), Path(folder) / str(number),
                    callbacks=[clock] if number == count - 1 else [],
                )
                for number in range(count)
            ]  # fmt: skip
            train_together(self.base, adapters, SftObjective(self.base), members)
        weights = {name: p.detach().clone() for name, p in adapters.named_parameters("run0").items()}
        adapters.detach()
        return clock, weights


def seconds(times: list[float]) -> float:
    """Of one step: the median, which what else runs on the machine hardly moves."""
    return statistics.median(later - earlier for earlier, later in pairwise(times[1:]))


def measured(case: Case, name: str, counts: list[int]) -> list[dict[str, Any]]:
    """A row for each number of runs."""
    found = []
    numbers = range(max(counts))
    solo = [case.alone(number) for number in numbers]
    for count in counts:
        clock, weights = case.together(count)
        wall = sum(seconds(one.wall) for one, _ in solo[:count])
        cpu = sum(seconds(one.cpu) for one, _ in solo[:count])
        expected = solo[0][1]
        off = max(float((weights[key] - value).abs().max()) for key, value in expected.items())
        moved = max(float(value.abs().max()) for value in expected.values())
        row = {
            "base": name, "tokens": case.tokens, "together": count, "steps": case.steps,
            "alone_seconds": round(wall, 4), "stacked_seconds": round(seconds(clock.wall), 4),
            "gain": round(wall / seconds(clock.wall), 3), "gain_cpu": round(cpu / seconds(clock.cpu), 3),
            "furthest_weight": f"{off:.1e}", "largest_weight": f"{moved:.1e}",
            "dtype": str(case.base.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            **results.where(__file__, "torch", "transformers", "graftlm"),
        }  # fmt: skip
        print(
            f"{name:>6} {case.tokens:>5} tokens x {count}: one by one {wall * 1e3:8.1f} ms, stacked "
            f"{row['stacked_seconds'] * 1e3:8.1f} ms, {row['gain']:.2f}x ({row['gain_cpu']:.2f}x of "
            f"processor time), weights differ by {off:.1e} of {moved:.1e}", flush=True,
        )  # fmt: skip
        found.append(row)
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["tiny", "0.02b", "0.13b"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--together", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    rows = []
    for name in given.bases:
        torch.manual_seed(0)
        kind = getattr(torch, given.dtype)
        base = AutoModelForCausalLM.from_config(SHAPES[name].config(4096)).to(kind).eval()
        for tokens in given.tokens:
            rows += measured(Case(base, tokens, given.steps), name, given.together)
    if given.keep:
        results.append(FILE, rows)


if __name__ == "__main__":
    main()
