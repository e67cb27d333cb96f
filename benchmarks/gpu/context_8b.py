"""Longest row that QLoRA on the shape of Llama 3.1 8B can train on: ours and PEFT + bitsandbytes.

    python benchmarks/gpu/context_8b.py [--keep]        one GPU; about ten minutes
    python benchmarks/gpu/context_8b.py --smoke         a tiny model on the CPU, three lengths

One row for a step, two steps for a length, everything recomputed (ours: also offloaded). The length doubles
until a side fails or takes too long; the last one that worked counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.case import Case
from harness.gpu import LIMIT, RESULTS, has_gpu, keep
from harness.measurement import Run
from harness.row import Outcome, Row, with_rates
from harness.sides.registry import BITSANDBYTES_FASTEST, GRAFT
from harness.table import markdown
from harness.worker import run_process, run_side

CASE = Case("gpu-context-8b", shape="8b", rows=1, length=8192, steps=2, warm_up=1, device="cuda",
            on_device=True, quantization="nf4", recompute="everything")  # fmt: skip
SIDES = ((GRAFT, "offload"), (GRAFT, "everything"), (BITSANDBYTES_FASTEST, "everything"))
WANTED = "more than 400,000 tokens on 80 GB"


def longest(case: Case, side: str, until: float, most: int) -> list[tuple[Case, Run]]:
    """Runs of doubled length, up to and with the first that fails."""
    found: list[tuple[Case, Run]] = []
    while case.length <= most and time.monotonic() < until and not (found and found[-1][1].failed):
        with tempfile.TemporaryDirectory() as scratch:
            run_process(["-m", "harness.writer", case.dumps(), scratch], "writing the tokens")
            run = run_side(case, side, 0, Path(scratch), max(1.0, until - time.monotonic()))
        said = run.failed or f"{run.tokens_per_second:,.0f} tokens/s"
        print(f"{side}, {case.recompute}, {case.length:,} tokens: {said}", flush=True)
        found.append((case, run))
        case = case.but(length=2 * case.length)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for the whole")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, three lengths")
    given = parser.parse_args()
    if not given.smoke and not has_gpu():
        raise SystemExit("There is no CUDA device here; --smoke runs a tiny form on the CPU.")
    started, lines = time.monotonic(), []
    for place, (side, policy) in enumerate(SIDES, 1):
        case = CASE.but(recompute=policy)
        if given.smoke:
            case = case.but(shape="tiny", device="cpu", length=64, recompute="everything")
        until = started + given.limit * place / len(SIDES)
        runs = longest(case, side, until, 256 if given.smoke else 2**21)
        worked = [tried.length for tried, run in runs if not run.failed]
        lines.append((side, policy, f"{max(worked, default=0):,}"))
        if given.keep:
            for tried, run in runs:
                keep(__file__, with_rates(Outcome(Row(tried), runs=[run])))
    print(markdown(("side", "recomputed", "longest row, tokens"), lines))
    print(f"- wanted: {WANTED}")


if __name__ == "__main__":
    main()
