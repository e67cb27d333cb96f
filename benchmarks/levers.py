"""What each of our levers is worth: a step with all of them beside steps that leave one out, in one run.

    python benchmarks/levers.py [--keep]           0.17B, 2,048 tokens a step; about five minutes on two cores
    python benchmarks/levers.py --policies         what recomputation costs and saves instead

Each way runs in a process of its own, the ways take turns. `gain` is what the lever gives while all others
are in place (gains overlap: their product is not the gain of all). A way is void unless its losses and
gradient norms agree with those of all levers together.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from harness import results
from harness.case import Case
from harness.measurement import Run
from harness.parity import judge
from harness.sides.graft import kind_name
from harness.sides.registry import GRAFT, GRAFT_COMPILED, GRAFT_EAGER
from harness.table import markdown, spread
from harness.worker import run_process, run_side

RESULTS = results.FOLDER / "levers.csv"
ALL = "all levers"
POLICIES = ("nothing", "cheap", "feed_forward", "everything")


def ways(case: Case, *, policies: bool) -> dict[str, tuple[Case, str]]:
    """What is run, by name: a case and a side."""
    if policies:
        return {policy: (case.but(recompute=policy), GRAFT) for policy in POLICIES}
    from graftlm.models.fusing.fused import KINDS

    found = {ALL: (case, GRAFT)}
    for kind in KINDS:
        found[f"without {kind_name(kind)}"] = (case.but(without=(kind_name(kind),)), GRAFT)
    return {**found, "with compiled layers": (case, GRAFT_COMPILED), "none of them": (case, GRAFT_EAGER)}


def measure(wanted: dict[str, tuple[Case, str]], rounds: int) -> dict[str, list[Run]]:
    """All ways in turns."""
    found: dict[str, list[Run]] = {name: [] for name in wanted}
    first = next(iter(wanted.values()))[0]
    with tempfile.TemporaryDirectory() as scratch:
        run_process(["-m", "harness.writer", first.dumps(), scratch], "writing the model")
        for number in range(rounds):
            for name, (case, side) in wanted.items():
                run = run_side(case, side, number, Path(scratch))
                print(
                    f"{number} {name:24} {run.failed or f'{run.tokens_per_second:,.0f} tokens/s'}", flush=True
                )
                found[name].append(run)
    return found


def table(found: dict[str, list[Run]]) -> str:
    """Markdown: the first way is what the others are compared with."""
    reference, lines = next(iter(found.values())), []
    for name, runs in found.items():
        pairs = [
            (run, other)
            for run, other in zip(runs, reference, strict=True)
            if not run.failed and not other.failed
        ]
        if not pairs:
            lines.append((name, runs[0].failed, "", "", "", ""))
            continue
        verdict = max((judge(run, other) for run, other in pairs), key=lambda each: each.loss)
        lines.append((
            name,
            spread([run.tokens_per_second for run, _ in pairs], "{:,.0f}"),
            spread([other.tokens_per_second / run.tokens_per_second for run, other in pairs]),
            spread([run.above_weights / 1e6 for run, _ in pairs], "{:,.0f}"),
            spread([run.above_weights / other.above_weights for run, other in pairs]),
            str(verdict),
        ))  # fmt: skip
    first = next(iter(found))
    return markdown(
        ("way", "tokens/s", f"gain of {first} over it", "MB above weights", f"over {first}", "agrees"), lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policies", action="store_true", help="recomputation instead of faster parts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shape", default="0.17b", help="see tuning.py")
    for name, default in (("rows", 4), ("length", 512), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", default="", help="real examples: a file under the shared data folder")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    given = parser.parse_args()
    case = Case(
        "levers", shape=given.shape, rows=given.rows, length=given.length, steps=given.steps, data=given.data
    )
    found = measure(ways(case, policies=given.policies), given.rounds)
    print(f"\n{table(found)}")
    if given.keep:
        keep(case, found)


def keep(case: Case, found: dict[str, list[Run]]) -> None:
    """Append one row for each run."""
    where = results.where(__file__, "torch", "transformers", "graftlm")
    head = {"shape": case.shape, "rows": case.rows, "length": case.length, "data": case.data}
    results.append(RESULTS, [
        {"way": name, "round": run.round, **head, "tokens_per_second": round(run.tokens_per_second, 1),
         "above_weights": run.above_weights, "note": run.note, "seconds": results.joined(run.seconds),
         "losses": results.joined(run.losses), "norms": results.joined(run.norms), **where}
        for name, runs in found.items() for run in runs if not run.failed
    ])  # fmt: skip


if __name__ == "__main__":
    main()
