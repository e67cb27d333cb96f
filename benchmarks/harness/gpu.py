"""What the scripts of benchmarks/gpu share: rows, a limit on the whole, a small form for a CPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

from harness import results
from harness.row import Outcome, Row, measure, require_valid
from harness.row_report import findings, records, table

RESULTS = results.FOLDER / "gpu.csv"
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "torchtune",
            "unsloth", "flash-attn", "graftlm")  # fmt: skip
LIMIT = 570.0
"""Seconds for a whole script."""


def main(script: str, about: str | None, rows: Sequence[Row], wanted: str) -> None:
    """Run the rows of a GPU script; `wanted` says the target of the row."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="instead of each row's own")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which no side is started")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model on the CPU, three steps, one round"
    )
    given = parser.parse_args()
    chosen = [small(row) for row in rows] if given.smoke else list(rows)
    if given.steps:
        chosen = [_with_steps(row, given.steps) for row in chosen]
    if not given.smoke and not has_gpu():
        raise SystemExit("There is no CUDA device here; --smoke runs a tiny form on the CPU.")
    until = time.monotonic() + given.limit
    outcomes = []
    for row in chosen:
        found = measure(
            row, 1 if given.smoke else given.rounds, given.limit, say=lambda line: print(line, flush=True),
            until=until,
        )  # fmt: skip
        print(
            f"\n### {row.case.row}\n\n{table(found)}\n\n{findings(found)}\n- wanted: {wanted}\n", flush=True
        )
        outcomes.append(found)
        if given.keep:
            keep(script, found)
    require_valid(outcomes)


def small(row: Row) -> Row:
    """The same on a tiny model on the CPU, with one peer."""
    case = row.case
    policy = "everything" if case.recompute == "offload" else case.recompute
    stored = case.quantization.partition("-")[0]  # no CPU multiplies in FP8
    tiny = {"shape": "tiny", "device": "cpu", "length": 64, "rows": 2, "steps": 3, "warm_up": 1}
    return replace(
        row, case=case.but(recompute=policy, quantization=stored, **tiny), peers=row.peers[:1], beside=()
    )


def keep(script: str, found: Outcome) -> None:
    """Append to the results."""
    where = results.where(script, *PACKAGES)
    results.append(RESULTS, [record | where for record in records(found)])


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _with_steps(row: Row, steps: int) -> Row:
    return replace(row, case=row.case.but(steps=steps))
