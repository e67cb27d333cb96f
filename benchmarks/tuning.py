"""Tuning, ours against every peer in the same run: speed, memory, time to the first step.

    python benchmarks/tuning.py                       the short form: under five minutes on two cores
    python benchmarks/tuning.py --full --keep         every row; about half an hour
    python benchmarks/tuning.py --rows lora-512 dora  these rows
    python benchmarks/tuning.py --rows lora-512 --without attention norms    what those parts are worth
    python benchmarks/tuning.py --list                the rows and their sides

Every side runs in a process of its own, the sides take turns, and all read the same model (random weights,
the widths of a Llama), start from the same adapter and see the same tokens. Ours runs the step of `graft
tune`. The best peer counts, for speed and for memory each; a side whose losses and gradient norms differ from
the first peer's is void. Tokens are real ones, without padding; MFU is the arithmetic that these tokens need
(harness/flops.py) over the matrix rate that this machine shows in the same run; memory is the peak in
training above libraries and frozen weights. Real examples come from the shared data folder (GRAFT_SHARED).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from harness import results
from harness.case import Case
from harness.row import Row, measure, require_valid
from harness.row_report import findings, records, table
from harness.shapes import SHAPES
from harness.sides.registry import (
    BITSANDBYTES_SIDES,
    GRAFT_COMPILED,
    GRAFT_DENSE,
    GRAFT_LORA,
    PEFT,
    TRL,
)

RESULTS = results.FOLDER / "tuning.csv"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "graftlm")
SHORT_PEFT = (PEFT, "PEFT, 16-bit adapters")
COMPILED = (PEFT, "PEFT, compiled", "PEFT, 16-bit adapters, compiled", GRAFT_COMPILED)
INSTRUCTIONS = "gpteacher-roleplay/train.jsonl"

FULL = (
    Row(Case("lora-512"), (*SHORT_PEFT, "PEFT, autocast"), speed=2, memory=0.5),
    Row(Case("lora-512-compiled"), COMPILED, speed=2, memory=0.5, most_rounds=1),
    Row(Case("lora-1024", rows=2, length=1024), SHORT_PEFT, speed=2, memory=0.5),
    Row(Case("lora-2048", rows=1, length=2048), SHORT_PEFT, speed=2, memory=0.5),
    Row(Case("lora-0.13b", shape="0.13b"), SHORT_PEFT, speed=2, memory=0.5),
    Row(Case("lora-0.5b", shape="0.5b"), SHORT_PEFT, speed=2, memory=0.5, most_rounds=1),
    Row(Case("qlora", quantization="nf4"), tuple(BITSANDBYTES_SIDES), (GRAFT_DENSE,), speed=2, memory=0.6),
    Row(Case("dora", method="dora"), SHORT_PEFT, (GRAFT_LORA,), speed=3),
    Row(Case("ia3", method="ia3"), SHORT_PEFT, (GRAFT_LORA,)),
    Row(Case("prefix", method="prefix"), SHORT_PEFT, (GRAFT_LORA,)),
    Row(Case("bottleneck", method="bottleneck"), (), (GRAFT_LORA,)),
    Row(
        Case("instructions", length=1024, data=INSTRUCTIONS),
        (TRL, "TRL, 16-bit, sorted by length", "TRL, 16-bit, padding free"),
        speed=4, memory=0.5,
    ),
    Row(
        Case("instructions-mixed", length=1024, data="t0-mix/train.jsonl"),
        (TRL, "TRL, 16-bit, sorted by length"), speed=4, memory=0.5, most_rounds=1,
    ),
    Row(Case("everything-recomputed", recompute="everything"), SHORT_PEFT, speed=2, memory=0.5),
)  # fmt: skip
"""Everything that the short form has, and more."""
SHORT = (
    Row(Case("lora-512"), SHORT_PEFT, speed=2, memory=0.5),
    Row(Case("instructions", length=1024, data=INSTRUCTIONS, steps=3), (TRL,), speed=4, most_rounds=1),
)


def main() -> None:
    given = arguments()
    rows = chosen(given)
    if given.list:
        for row in rows:
            print(f"{row.case.row}: {row.case}\n  " + "\n  ".join(row.sides))
        return
    outcomes = []
    for row in rows:
        found = measure(row, given.rounds, given.limit, say=lambda line: print(line, flush=True))
        outcomes.append(found)
        print(f"\n### {row.case.row}\n\n{table(found)}\n\n{findings(found)}\n", flush=True)
        if given.keep:
            where = results.where(__file__, *PACKAGES)
            results.append(RESULTS, [record | where for record in records(found)])

    require_valid(outcomes)


def chosen(given: argparse.Namespace) -> list[Row]:
    """The rows of this run, changed as the options say."""
    rows = FULL if given.full or given.rows else SHORT
    names = [row.case.row for row in rows]
    wrong = sorted(set(given.rows or ()) - set(names))
    if wrong:
        raise SystemExit(f"No row {', '.join(wrong)}; there are {', '.join(names)}")
    changes = {
        name: getattr(given, name)
        for name in ("steps", "shape", "rank", "device", "recompute", "dropout")
        if getattr(given, name) is not None
    }
    changes |= {"without": tuple(given.without)}
    found = []
    for row in rows:
        if given.rows and row.case.row not in given.rows:
            continue
        peers = tuple(side for side in row.peers if not given.sides or side in given.sides)
        beside = tuple(side for side in row.beside if not given.sides or side in given.sides)
        found.append(replace(row, case=row.case.but(**changes), peers=peers, beside=beside))
    return found


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every row and every way of the peers")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these rows of the full form")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="these sides beside ours")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without", nargs="+", default=(), metavar="PART",
                        help="faster parts of ours that stay off: files of models/fusing")  # fmt: skip
    parser.add_argument("--recompute", help="a policy of train.recompute; peers: everything or nothing")
    for name in ("steps", "rank"):
        parser.add_argument(f"--{name}", type=int, help="instead of each row's own")
    parser.add_argument("--dropout", type=float, help="of LoRA; above 0, losses agree only by chance")
    parser.add_argument(
        "--shape", help=f"instead of each row's own: {', '.join(SHAPES)}; or 1024x8x2816x32000"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a side is given up")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
