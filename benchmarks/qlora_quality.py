"""What a quantised base costs in quality: LoRA against QLoRA with every kind of base, on two real tasks.

    python benchmarks/qlora_quality.py --errors             error of 4- and 8-bit types on weights: seconds
    python benchmarks/qlora_quality.py [--seeds 3] [--jobs 2]  `graft tune` with every kind: half an hour
    python benchmarks/qlora_quality.py --table              the table of what was measured so far

Tasks, models, steps and LoRA's learning rates are those that `methods.py` found best. Every variant of a seed
has the same hold-out, order of rows and, but for LoftQ, start of the adapter: differences are paired by seed.
Rows go to `results/qlora_quality.csv`; a run that is there already is not repeated. Real models and data are
found in `../shared`, or where GRAFT_SHARED says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import results
from harness.tuned_run import tuned
from harness.writer import SHARED
from torch import Tensor

from graftlm.models.load import load_model
from graftlm.quant.convert import dense_weight, quantisable
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme

RESULTS = results.FOLDER / "qlora_quality.csv"
ERRORS = results.FOLDER / "qlora_errors.csv"

TASKS = {"e2e-nlg": ("gpt2-tiny-en", 9.6e-3), "wikisql": ("stories260K", 5.0e-3)}
REFERENCE = "LoRA, bfloat16"
VARIANTS: dict[str, tuple[str, ...]] = {
    "LoRA, float32": ("method.type=lora", "model.dtype=float32"),
    REFERENCE: ("method.type=lora", "model.dtype=bfloat16"),
    "nf4": ("method.type=qlora", "model.quantization=nf4"),
    "nf4, plain scales": ("method.type=qlora", "model.quantization=nf4", "model.double_quant=false"),
    "nf4, LoftQ": ("method.type=qlora", "model.quantization=nf4", "method.init_lora_weights=loftq"),
    "fp4": ("method.type=qlora", "model.quantization=fp4"),
    "int8": ("method.type=qlora", "model.quantization=int8"),
    "fp8": ("method.type=qlora", "model.quantization=fp8"),
}
FIRST_SEED, STEPS = 42, 50
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Quantile of 97.5 % of Student's t for a mean of so many values."""


@dataclass(frozen=True)
class Row:
    """One run. Losses in nats per target token on held-out rows; bits of the adapted layers' weights."""

    task: str
    model: str
    variant: str
    seed: int
    steps: int
    rate: float
    bits_per_parameter: float
    loss_before: float
    loss_after: float
    seconds: float
    machine: str
    versions: str
    date: str


@dataclass(frozen=True)
class Job:
    """What to run."""

    task: str
    variant: str
    seed: int
    steps: int


def run(job: Job) -> Row:
    """One `graft tune` in a process of its own."""
    model, rate = TASKS[job.task]
    settings = [
        *VARIANTS[job.variant],
        f"train.seed={job.seed}",
        f"train.max_steps={job.steps}",
        f"train.learning_rate={rate}",
        "eval.metrics=[loss]",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        found = tuned(job.task, model, settings, Path(scratch) / "run")
        if found is None:
            raise SystemExit(f"{job}: there is nothing to train")
        figures, classes = found.figures, found.read("report.json")["memory"]["classes"]
    layers = next(item for item in classes if item["name"] in ("quantised linears", "dense linears"))
    return Row(
        job.task, model, job.variant, job.seed, job.steps, rate,
        8 * layers["bytes"] / layers["parameters"],
        figures["before"]["held_out_loss"], figures["after"]["held_out_loss"], float(figures["seconds"]),
        results.machine(), results.versions("torch", "transformers", "graftlm"), results.today(),
    )  # fmt: skip


def measured() -> list[Row]:
    """Every row of the results so far."""
    return results.read_as(Row, RESULTS)


def result(job: Job) -> None:
    """The row of a job, unless it was measured before."""
    known = {(row.task, row.variant, row.seed, row.steps) for row in measured()}
    if (job.task, job.variant, job.seed, job.steps) in known:
        return
    row = run(job)
    results.append(RESULTS, [asdict(row)])
    change = f"{row.loss_before:.3f} -> {row.loss_after:.4f}"
    print(f"{row.task:8} {row.variant:18} seed {row.seed}: {change}, {row.seconds:.0f} s", flush=True)


def table(rows: Iterable[Row], steps: int) -> str:
    """Markdown: mean over seeds, and the difference to LoRA paired by seed with its 95 % interval."""
    lines: list[str] = []
    for task, (model, rate) in TASKS.items():
        mine = [row for row in rows if row.task == task and row.steps == steps]
        reference = {row.seed: row for row in mine if row.variant == REFERENCE}
        if not reference:
            continue
        lines += [
            f"### {task} on {model} ({steps} steps, rate {rate:.1e}, seeds {', '.join(map(str, reference))})",
            "",
        ]
        lines += [
            "| base | bits per parameter | loss before | held-out loss | against 16 bits | 95 % interval |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        for variant in VARIANTS:
            group = [row for row in mine if row.variant == variant and row.seed in reference]
            if group:
                lines.append(_line(group, reference))
        lines.append("")
    return "\n".join(lines)


def _line(group: Sequence[Row], reference: dict[int, Row]) -> str:
    shares = [100 * (row.loss_after / reference[row.seed].loss_after - 1) for row in group]
    mean = statistics.mean(shares)
    before, after = (
        statistics.mean(getattr(row, name) for row in group) for name in ("loss_before", "loss_after")
    )
    cells = [group[0].variant, f"{group[0].bits_per_parameter:.3f}", f"{before:.3f}", f"{after:.4f}"]
    if group[0].variant == REFERENCE:
        return f"| {' | '.join([*cells, '', ''])} |"
    spread = "one seed"
    if len(shares) > 1:
        half = STUDENT[len(shares)] * statistics.stdev(shares) / len(shares) ** 0.5
        spread = f"{mean - half:+.2f} to {mean + half:+.2f} %"
    return f"| {' | '.join([*cells, f'{mean:+.2f} %', spread])} |"


def by_scheme(scheme: Scheme) -> Callable[[Tensor], tuple[Tensor, float]]:
    """One of our kinds: the weight as it comes back, and its bits per parameter."""

    def stored(weight: Tensor) -> tuple[Tensor, float]:
        packed = encode(weight, scheme)
        return packed.decode(torch.float32), packed.bits_per_parameter

    return stored


def by_grid(
    values: Sequence[float], block: int, bits: float, scale: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], tuple[Tensor, float]]:
    """A 4-bit type that Graft does not store: nearest of `values` times the scale of each block.

    `scale` rounds the exact scales (largest magnitude / largest value, [blocks, 1]) to what would be stored.
    """
    grid = torch.tensor(values)
    bounds = (grid[:-1] + grid[1:]) / 2

    def stored(weight: Tensor) -> tuple[Tensor, float]:
        flat = weight.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
        scales = scale((blocks.abs().amax(dim=1, keepdim=True) / grid.max()).clamp(min=1e-30))
        found = grid[torch.bucketize(blocks / scales, bounds)] * scales
        return found.flatten()[: len(flat)].view_as(weight), bits

    return stored


def of_power_of_two(scales: Tensor) -> Tensor:
    """The E8M0 scales of MXFP4 by the rule of its standard: values of more than 6 scales are cut off."""
    return torch.exp2(torch.floor(torch.log2(scales * E2M1[-1])) - 2)


def of_eight_bits(scales: Tensor) -> Tensor:
    """The E4M3 scales of NVFP4, under one float32 scale for the tensor."""
    whole = scales.max() / 448
    return (scales / whole).to(torch.float8_e4m3fn).float().clamp(min=2.0**-9) * whole


E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TYPES = {
    **{f"nf4, blocks of {block}": by_scheme(Scheme("nf4", True, block)) for block in (32, 64, 128)},
    "nf4, blocks of 64, plain scales": by_scheme(Scheme("nf4", False, 64)),
    "fp4, blocks of 64": by_scheme(Scheme("fp4", True, 64)),
    "int4, blocks of 32, 16-bit scales": by_grid(
        range(-7, 8), 32, 4.5, lambda scales: scales.bfloat16().float()
    ),
    "int4, blocks of 64, 16-bit scales": by_grid(
        range(-7, 8), 64, 4.25, lambda scales: scales.bfloat16().float()
    ),
    "MXFP4 (blocks of 32)": by_grid(E2M1, 32, 4.25, of_power_of_two),
    "NVFP4 (blocks of 16)": by_grid(E2M1, 16, 4.5, of_eight_bits),
    "int8, rows": by_scheme(Scheme("int8")),
    "fp8, rows": by_scheme(Scheme("fp8")),
}


def weights() -> dict[str, list[Tensor]]:
    """Normal values, and the linear layers of real models."""
    torch.manual_seed(0)
    found = {"normal, 2048 x 2048": [torch.randn(2048, 2048)]}
    for name in ("gpt2-tiny-en", "stories260K"):
        model, _ = load_model(SHARED / "models" / name, dtype=torch.float32)
        found[name] = [dense_weight(layer).detach() for layer in quantisable(model).values()]
    return found


def errors() -> str:
    """Markdown: |W - stored W| / |W| over all layers together, for every type."""
    sources = weights()
    lines = [
        f"| type | {' | '.join(f'{name}: bits | error' for name in sources)} |",
        f"|---|{'---|---|' * len(sources)}",
    ]
    rows: list[dict[str, object]] = []
    for kind, stored in TYPES.items():
        cells = [kind]
        for name, matrices in sources.items():
            back = [stored(matrix) for matrix in matrices]
            pairs = list(zip(back, matrices, strict=True))
            wrong = sum(float((it - matrix).double().square().sum()) for (it, _), matrix in pairs)
            error = (wrong / sum(float(matrix.double().square().sum()) for matrix in matrices)) ** 0.5
            bits = sum(size * matrix.numel() for (_, size), matrix in pairs) / sum(
                m.numel() for m in matrices
            )
            cells += [f"{bits:.3f}", f"{100 * error:.3f} %"]
            rows.append({"type": kind, "weights": name, "bits_per_parameter": bits, "relative_error": error})
        lines.append(f"| {' | '.join(cells)} |")
    ERRORS.unlink(missing_ok=True)
    results.append(ERRORS, rows)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--errors", action="store_true", help="only the errors of the types")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 42 on")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each if several")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    if options.errors:
        print(errors())
        return
    if options.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    if not options.table:
        jobs = [
            Job(task, variant, FIRST_SEED + number, options.steps)
            for number in range(options.seeds)
            for task in options.tasks
            for variant in options.variants
        ]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(result, jobs))
    print(table(measured(), options.steps))


if __name__ == "__main__":
    main()
