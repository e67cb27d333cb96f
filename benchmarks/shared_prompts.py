"""A DPO step on pairs with long prompts beside TRL's, and beside an SFT step of as many tokens: time, memory.

    python benchmarks/shared_prompts.py [--rounds 3] [--keep]
    python benchmarks/shared_prompts.py --data hh-harmless/train.jsonl --pairs 8      lengths of real pairs

A Llama with random bfloat16 weights, LoRA of rank 16 on every linear layer; all sides start from the same
adapter and see the same pairs. "Graft" is the step of `graft tune --task dpo`: the prompt is computed once
for both answers. "Graft, prompts repeated" gives each answer a prompt of its own, still without padding.
"Graft, SFT" trains on the tokens of a pair as on one text, with labels on the answers: as many tokens, and as
many labels. TRL trains with 16-bit adapters; its reference is the model without its adapter, computed before
("precomputed") or in each step, or a second model. Nothing is recomputed in backward, on any side.

Every side and round runs in a process of its own, the sides take turns. "CPU s" is the processor time of a
step, median over steps without the first; it is what other processes on the machine disturb least. "Peak" is
the most that is resident in training above the libraries, frozen weights included; "above" leaves these out.
First losses and gradient norms are shown: a side whose are others than TRL's does other work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import results
from harness.case import Case
from harness.measurement import Run
from harness.pair_sides import PAIRS, SIDES, Pair
from harness.worker import environment
from harness.writer import SHARED, TOKENIZER, write_model

RESULTS = results.FOLDER / "shared_prompts.csv"
PACKAGES = ("torch", "transformers", "peft", "trl", "graftlm")


def synthetic(case: Case, prompt: int, answer: int) -> list[Pair]:
    """Pairs of one length; one side of each is more regular than the other."""
    import torch

    random = torch.Generator().manual_seed(1)

    def tokens(count: int, most: int) -> list[int]:
        return [int(token) for token in torch.randint(most, (count,), generator=random)]

    vocabulary = case.model.vocabulary
    return [
        (tokens(prompt, vocabulary), tokens(answer, 64), tokens(answer, vocabulary))
        for _ in range(case.steps * case.rows)
    ]


def real(case: Case) -> list[Pair]:
    """The first pairs of a real data set, as `graft tune` encodes them."""
    from graftlm.models.load import load_tokenizer
    from graftlm.tasks.preference import DpoTask
    from graftlm.training.recipe import DataSection, ModelSection, Recipe

    section = DataSection(path=str(SHARED / "data" / case.data), max_length=case.length, bad_rows="skip")
    task = DpoTask(Recipe(model=ModelSection(name=TOKENIZER), data=section, task={"type": "dpo"}))
    task.read()
    task.encode(load_tokenizer(SHARED / "models" / TOKENIZER))
    rows = task.dataset.train[: case.steps * case.rows]
    return [(list(row.prompt), list(row.answers[0]), list(row.answers[1])) for row in rows]


def measured(case: Case, sides: Sequence[str], rounds: int, found: list[Pair]) -> Iterator[Run]:
    """Every side in turns, in processes of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(case, folder)
        (folder / PAIRS).write_text(json.dumps(found), encoding="utf-8")
        for number in range(rounds):
            for side in sides:
                command = [
                    sys.executable,
                    "-m",
                    "harness.pair_sides",
                    case.dumps(),
                    side,
                    str(number),
                    scratch,
                ]
                done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
                if done.returncode:
                    yield Run(side, number, failed=done.stderr.strip().splitlines()[-1])
                else:
                    yield Run(**json.loads(done.stdout.strip().splitlines()[-1]))


def table(runs: Sequence[Run]) -> str:
    """Medians over rounds."""
    lines = [
        "| side | CPU s | s | peak MiB | above MiB | first losses | norms |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in dict.fromkeys(run.side for run in runs):
        own = [run for run in runs if run.side == side and not run.failed]
        if not own:
            lines.append(f"| {side} | {next(run.failed for run in runs if run.side == side)} |")
            continue
        figures = (
            statistics.median(run.processor_seconds for run in own),
            statistics.median(statistics.median(run.seconds[1:]) for run in own),
            statistics.median(run.peak_training - run.imports for run in own) / 2**20,
            statistics.median(run.above_weights for run in own) / 2**20,
        )
        shown = " | ".join(
            format(value, form) for value, form in zip(figures, (".2f", ".2f", ".0f", ".0f"), strict=True)
        )
        first = " ".join(f"{value:.4f}" for value in own[0].losses[:3])
        norms = " ".join(f"{value:.3f}" for value in own[0].norms[:3])
        lines.append(f"| {side} | {shown} | {first} | {norms} |")
    return "\n".join(lines)


def record(case: Case, found: Sequence[Pair], run: Run) -> dict[str, Any]:
    """A line of the results file."""
    return {
        "side": run.side, "shape": case.shape, "data": case.data or "synthetic", "pairs": case.rows,
        "prompt": round(statistics.mean(len(pair[0]) for pair in found)),
        "answer": round(statistics.mean(len(part) for pair in found for part in pair[1:])),
        "round": run.round, "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "processor_seconds": f"{run.processor_seconds:.4g}" if run.seconds else "",
        "seconds": f"{statistics.median(run.seconds[1:]):.4g}" if run.seconds else "",
        "peak_bytes": run.peak_training - run.imports, "above_weights_bytes": run.above_weights,
        "losses": results.joined(run.losses), "norms": results.joined(run.norms), "failed": run.failed,
        **results.where(__file__, *PACKAGES),
    }  # fmt: skip


def main() -> None:
    """Measure, show, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="0.05b")
    parser.add_argument("--pairs", type=int, default=2, help="in a step")
    parser.add_argument("--prompt", type=int, default=768, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument(
        "--data", default="", help="a file under the shared data folder, instead of random tokens"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--keep", action="store_true", help=f"append to {RESULTS.name}")
    given = parser.parse_args()
    length = 1024 if given.data else given.prompt + 2 * given.answer
    case = Case("pairs", given.shape, rows=given.pairs, length=length, steps=given.steps, data=given.data)
    found = real(case) if given.data else synthetic(case, given.prompt, given.answer)
    runs: list[Run] = []
    for run in measured(case, given.sides, given.rounds, found):
        seconds = math.nan if run.failed else run.processor_seconds
        print(f"{run.side}, round {run.round}: {run.failed or f'{seconds:.2f} CPU s a step'}", flush=True)
        runs.append(run)
    print(table(runs))
    if given.keep:
        results.append(RESULTS, [record(case, found, run) for run in runs])


if __name__ == "__main__":
    main()
