"""Every method on two real tasks through `graft tune`: quality, forgetting, size, memory and time.

    python benchmarks/methods.py                      one seed, the default learning rate, 20 steps: minutes
    python benchmarks/methods.py --full --jobs 2      rates searched on seed 42, then three seeds: hours
    python benchmarks/methods.py --table              the table of what was measured so far

Rows go to `benchmarks/results/methods.csv`, one per run; a run that is there already is not repeated. The
learning rate of each method is searched by factors of about three around its default until the best lies
inside the grid, on seed 42 only; the other seeds run at the best rate. Real models and data are found in
`../shared`, or where GRAFT_SHARED says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import results
from harness.tuned_run import TunedRun, tuned

RESULTS = results.FOLDER / "methods.csv"

TASKS = {"e2e-nlg": "gpt2-tiny-en", "wikisql": "stories260K"}
METHODS: dict[str, tuple[str, ...]] = {
    "full": ("type=full",),
    "lora": ("type=lora",),
    "lora, rsLoRA": ("type=lora", "use_rslora=true"),
    "lora, PiSSA": ("type=lora", "init_lora_weights=pissa"),
    "lora, EVA": ("type=lora", "init_lora_weights=eva"),
    "dora": ("type=dora",),
    "ia3": ("type=ia3",),
    "bottleneck, Houlsby": ("type=bottleneck", "placement=houlsby"),
    "bottleneck, Pfeiffer": ("type=bottleneck", "placement=pfeiffer"),
    "bottleneck, parallel": ("type=bottleneck", "placement=parallel"),
    "prefix": ("type=prefix",),
    "prompt": ("type=prompt",),
    "adaption_prompt": ("type=adaption_prompt",),
    "norms": ("type=norms",),
    "biases": ("type=biases",),
}
SEEDS = (42, 43, 44)
FACTORS = (1 / 3, 1.0, 3.0)
SHORT, FULL = 20, 50
"""Optimizer steps of a run in the two forms."""
WIDEST = 5
"""Rates tried at most per method and task."""


@dataclass(frozen=True)
class Row:
    """One run. Losses in nats per target token on held-out rows; `known` on text the base itself wrote."""

    task: str
    model: str
    method: str
    rate: float
    seed: int
    steps: int
    loss_before: float
    loss_after: float
    known_before: float
    known_after: float
    trainable: int
    seconds: float
    peak_memory_bytes: int
    file_bytes: int
    machine: str
    versions: str
    date: str

    @property
    def forgetting(self) -> float:
        """How much the loss on known text rose, as a share."""
        return self.known_after / self.known_before - 1


@dataclass(frozen=True)
class Job:
    """What to run; a rate of None is the default of the method."""

    task: str
    method: str
    rate: float | None
    seed: int
    steps: int


def run(job: Job) -> Row | None:
    """One `graft tune` in a process of its own; None where the base has nothing that the method trains."""
    settings = [f"method.{setting}" for setting in METHODS[job.method]]
    settings += [f"train.seed={job.seed}", f"train.max_steps={job.steps}", "eval.metrics=[loss]"]
    settings += [] if job.rate is None else [f"train.learning_rate={job.rate:.3g}"]
    with tempfile.TemporaryDirectory() as scratch:
        found = tuned(job.task, TASKS[job.task], settings, Path(scratch) / "run")
        return None if found is None else _row(job, found)


def _row(job: Job, found: TunedRun) -> Row:
    figures, plan = found.figures, found.read("plan.json")
    return Row(
        job.task, TASKS[job.task], job.method, plan["learning_rate"], job.seed, job.steps,
        figures["before"]["held_out_loss"], figures["after"]["held_out_loss"],
        figures["before"]["known_text_loss"], figures["after"]["known_text_loss"],
        plan["trainable"], float(figures["seconds"]), int(figures["peak_memory_bytes"]), found.file_bytes,
        results.machine(), results.versions("torch", "transformers", "graftlm"), results.today(),
    )  # fmt: skip


def measured() -> list[Row]:
    """Every row of the results so far."""
    return results.read_as(Row, RESULTS)


def keep(row: Row) -> None:
    """Append one row."""
    results.append(RESULTS, [asdict(row)])
    change = f"{row.loss_before:.3f} -> {row.loss_after:.3f}"
    print(f"{row.task:10} {row.method:22} rate {row.rate:.1e} seed {row.seed}: {change}", flush=True)


def result(job: Job) -> Row | None:
    """The row of a job, measured now or before."""
    for row in measured():
        same_job = (row.task, row.method, row.seed, row.steps) == (job.task, job.method, job.seed, job.steps)
        if same_job and job.rate is not None and abs(row.rate / job.rate - 1) < 0.02:
            return row
    row = run(job)
    if row is not None:
        keep(row)
    return row


def search(task: str, method: str, steps: int, seeds: Sequence[int]) -> None:
    """The best rate on the first seed, widened while it lies at an edge; then every seed at that rate."""
    start = result(Job(task, method, None, seeds[0], steps))
    if start is None:
        return
    rows = {start.rate: start}
    wanted = [start.rate * factor for factor in FACTORS]
    while wanted and len(rows) < WIDEST:
        for rate in wanted:
            if all(abs(rate / known - 1) > 0.02 for known in rows):
                row = result(Job(task, method, rate, seeds[0], steps))
                assert row is not None
                rows[row.rate] = row
        best = min(rows.values(), key=lambda row: row.loss_after).rate
        edges = {min(rows): best / 3, max(rows): best * 3}
        wanted = [edges[best]] if best in edges else []
    best = min(rows.values(), key=lambda row: row.loss_after).rate
    for seed in seeds[1:]:
        result(Job(task, method, best, seed, steps))


def table(rows: Iterable[Row], steps: int) -> str:
    """Markdown: each method at its best rate, mean over seeds with the range; time of short runs only.

    Those run one at a time; in the full form, two runs share the machine.
    """
    lines: list[str] = []
    is_timed = steps == SHORT
    for task, model in TASKS.items():
        mine = [row for row in rows if row.task == task and row.steps == steps]
        if not mine:
            continue
        lines += [f"### {task} on {model} ({steps} steps, base {mine[0].loss_before:.3f})", ""]
        heads = ("method", "held-out loss", "seeds", "learning rate", "forgetting", "trainable", "file")
        lines += [f"| {' | '.join((*heads, 'memory', *(['time'] if is_timed else [])))} |"]
        lines += [f"|{'---|' * (len(heads) + 1 + is_timed)}"]
        groups = [_at_best_rate([row for row in mine if row.method == method]) for method in METHODS]
        found = [group for group in groups if group]
        for group in sorted(found, key=lambda group: statistics.mean(row.loss_after for row in group)):
            lines.append(_line(group, is_timed))
        lines.append("")
    return "\n".join(lines)


def _at_best_rate(rows: Sequence[Row]) -> list[Row]:
    first = [row for row in rows if row.seed == SEEDS[0]]
    if not first:
        return []
    best = min(first, key=lambda row: row.loss_after).rate
    return [row for row in rows if abs(row.rate / best - 1) < 0.02]


def _line(rows: Sequence[Row], is_timed: bool) -> str:
    losses = [row.loss_after for row in rows]
    forgetting = [100 * row.forgetting for row in rows]
    return (
        f"| {rows[0].method} | {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) "
        f"| {len(rows)} | {rows[0].rate:.1e} | {statistics.mean(forgetting):+.0f} % | {rows[0].trainable:,} "
        f"| {rows[0].file_bytes / 1024:,.0f} KiB "
        f"| {max(row.peak_memory_bytes for row in rows) / 2**20:,.0f} MiB |"
        + (f" {statistics.median(row.seconds for row in rows):.0f} s |" if is_timed else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="search rates, three seeds")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each if several")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    steps = options.steps or (FULL if options.full else SHORT)
    if options.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            pairs = [(task, method) for method in options.methods for task in options.tasks]
            if options.full:
                list(pool.map(lambda pair: search(*pair, steps, SEEDS), pairs))
            else:
                list(pool.map(lambda pair: result(Job(*pair, None, SEEDS[0], steps)), pairs))
    print(table(measured(), steps))


if __name__ == "__main__":
    main()
