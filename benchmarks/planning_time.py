"""Predicted time of runs against the time that they took, before and after the first steps corrected it.

    python benchmarks/planning_time.py                      every run; about 8 minutes on two quiet cores
    python benchmarks/planning_time.py --only lora-512      these configurations
    python benchmarks/planning_time.py --keep               append to results/planning-time.csv

Each configuration is one `graft tune` in a process of its own, on rows of a shared data set. "Before" is the
estimate of `graft plan` from config, data and the machine's kept rates; "after" is the same, corrected by
what the run had shown by its third step (`planning.correction`): its loading, the measurement of its base,
its second and third step. The machine's rates are measured first, unless they are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from harness import results
from harness.shapes import SHAPES, shape_of
from harness.table import markdown
from harness.worker import environment
from harness.writer import SHARED

RESULTS = results.FOLDER / "planning-time.csv"
SEEN_STEPS = slice(1, 3)
"""The steps that correct the estimate: the first prepares what the others use."""
BEFORE = ("start", "load", "attach")
"""Phases that belong to loading, with the start of Python."""
QUIET = ("output.report_to=none", "train.save_steps=100000")


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str
    base: str
    """`sprout`, a shared model, or a shape of the harness with random weights."""
    data: str
    rows: int
    settings: tuple[str, ...]


def _of(name: str, base: str, data: str, rows: int, *settings: str) -> Config:
    return Config(name, base, data, rows, settings)


LONG, SHORT = "gpteacher-roleplay", "e2e-nlg"
L128, L512, L1024 = (f"data.max_length={length}" for length in (128, 512, 1024))


def _steps(count: int, size: int, passes: int) -> tuple[str, ...]:
    named = {"max_steps": count, "per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    return tuple(f"train.{key}={value}" for key, value in named.items())


CONFIGS = (
    _of("lora-sprout-unpacked", "sprout", SHORT, 600, "data.packing=false", *_steps(80, 8, 1)),
    _of("ia3-sprout", "sprout", LONG, 200, "method.type=ia3", *_steps(40, 2, 2)),
    _of("full-sprout", "sprout", SHORT, 600, "method.type=full", *_steps(50, 4, 1)),
    _of("prompt-sprout", "sprout", SHORT, 400, "method.type=prompt", *_steps(40, 8, 1)),
    _of("lora-stories", "stories260K", SHORT, 400, "data.max_length=256", *_steps(60, 2, 1)),
    _of("lora-gpt2", "gpt2-tiny-en", SHORT, 400, "data.max_length=256", *_steps(40, 4, 2)),
    _of("dora-gpt2", "gpt2-tiny-en", SHORT, 400, "method.type=dora", L128, *_steps(30, 2, 1)),
    _of("lora-0.02b-512", "0.02b", LONG, 150, L512, *_steps(25, 4, 1)),
    _of("qlora-0.02b", "0.02b", LONG, 150, "model.quantization=nf4", L512, *_steps(20, 4, 1)),
    _of("lora-0.05b-512", "0.05b", LONG, 120, L512, *_steps(20, 4, 1)),
    _of("lora-0.05b-1x512", "0.05b", LONG, 120, L512, *_steps(30, 1, 2)),
    _of("lora-0.05b-1024", "0.05b", LONG, 120, L1024, *_steps(15, 4, 1)),
    _of("lora-0.05b-r128", "0.05b", LONG, 120, "method.r=128", L512, *_steps(20, 4, 1)),
    _of("dora-0.05b", "0.05b", LONG, 120, "method.type=dora", L512, *_steps(20, 4, 1)),
    _of("ia3-0.05b", "0.05b", LONG, 120, "method.type=ia3", L512, *_steps(20, 4, 1)),
    _of("bottleneck-0.05b", "0.05b", LONG, 120, "method.type=bottleneck", L512, *_steps(20, 4, 1)),
    _of("prefix-0.05b", "0.05b", LONG, 120, "method.type=prefix", L512, *_steps(20, 4, 1)),
    _of("full-0.05b", "0.05b", LONG, 120, "method.type=full", L512, *_steps(15, 4, 1)),
    _of("qlora-0.05b", "0.05b", LONG, 120, "model.quantization=nf4", L512, *_steps(20, 4, 1)),
    _of("everything-0.05b", "0.05b", LONG, 120, "train.recompute=everything", L512, *_steps(20, 4, 1)),
    _of("lora-0.13b", "0.13b", LONG, 100, L512, *_steps(15, 4, 1)),
    _of("qlora-0.13b", "0.13b", LONG, 100, "model.quantization=nf4", L1024, *_steps(12, 2, 1)),
    _of("lora-0.17b-1024", "0.17b", LONG, 100, L1024, *_steps(12, 2, 1)),
)  # fmt: skip


def base_of(name: str, folder: Path) -> str:
    """The base's name for `graft`; a shape is written into `folder` with random weights."""
    if name not in SHAPES:
        return name if name == "sprout" else str(SHARED / "models" / name)
    path = folder / name
    if not path.is_dir():
        _write_base(name, path)
    return str(path)


def _write_base(name: str, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from graftlm.models.load import load_tokenizer

    torch.manual_seed(0)
    config = shape_of(name).config(2048)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    load_tokenizer("sprout").save_pretrained(path)


def rows_of(config: Config, folder: Path) -> Path:
    """The first rows of the data set, as a file of their own."""
    path = folder / f"{config.data}-{config.rows}.jsonl"
    with (SHARED / "data" / config.data / "train.jsonl").open(encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, config.rows)), encoding="utf-8")
    return path


def predicted(config: Config, base: str, data: Path) -> tuple[Any, Any, Any]:
    """The estimate, the workload that it is of, and the facts of the base."""
    from graftlm.planning.base_facts import base_facts
    from graftlm.planning.hardware import this_machine
    from graftlm.planning.speed import estimate_time
    from graftlm.tasks.table import task_of
    from graftlm.training.recipe import make_recipe
    from graftlm.verbs.row_lengths import row_lengths

    recipe = make_recipe({"model": {"name": base}, "data": {"path": str(data)}, "task": "sft"},
                         (*QUIET, *config.settings))  # fmt: skip
    facts = base_facts(base)
    task = task_of(recipe)
    task.read()
    rows, recipe = row_lengths(task, recipe, facts)
    effective = rows.effective(recipe, facts)
    workload = rows.workload(effective)
    machine, policy = this_machine(), recipe.train.recompute
    return estimate_time(effective, facts, workload, machine, recompute=policy), workload, facts


def run(
    config: Config, base: str, data: Path, out: Path
) -> tuple[float, dict[str, float], list[dict[str, Any]]]:
    """Wall seconds of `graft tune`, seconds by phase, and the events of its steps.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "graftlm", "tune", str(data), "--model", base, "--task", "sft"]
    command += ["--out", str(out), "--json"]
    command += [part for setting in (*QUIET, *config.settings) for part in ("--set", setting)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    wall = time.monotonic() - started
    if not (out / "report.json").is_file():
        raise SystemExit(f"{config.name}: {' '.join(command)}\n{done.stderr[-2000:]}")
    phases = json.loads(done.stdout.strip().splitlines()[-1])["phase_seconds"]
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return wall, phases, [event for event in events if event["kind"] == "step"]


def measured(config: Config, folder: Path) -> dict[str, Any]:
    """One row of the results."""
    from graftlm.planning.correction import Seen, SeenStep, corrected

    base, data = base_of(config.base, folder), rows_of(config, folder)
    estimate, workload, facts = predicted(config, base, data)
    with tempfile.TemporaryDirectory() as scratch:
        wall, phases, steps = run(config, base, data, Path(scratch) / "run")
    seen = [SeenStep(step["seconds"], step["real_tokens"]) for step in steps[SEEN_STEPS]]
    loaded = wall - sum(seconds for name, seconds in phases.items() if name not in (*BEFORE, "evaluate base"))
    after = corrected(estimate, workload, Seen(seen, {"load": loaded}, phases.get("evaluate base", 0.0)))
    parts = {part.name: part.amount for part in estimate.parts}
    actual = {
        "load": loaded,
        "evaluate": phases.get("evaluate", 0.0),
        "steps": sum(step["seconds"] for step in steps),
        "save": phases.get("save", 0.0) + phases.get("between", 0.0),
        "verify": phases.get("verify", 0.0),
    }
    mean = actual["steps"] / len(steps)
    return {
        "name": config.name, "base": config.base, "parameters": facts.total, "data": config.data,
        "rows": config.rows, "settings": " ".join(config.settings), "steps": len(steps),
        "batch_tokens": round(workload.mean_batch_tokens, 1),
        "step_before": round(estimate.step_seconds, 5), "step_after": round(after.step_seconds, 5),
        "step_actual": round(mean, 5), "before": round(estimate.seconds, 2), "after": round(after.seconds, 2),
        "actual": round(wall, 2),
        **{f"{name}_before": round(parts[name], 2) for name in actual},
        **{f"{name}_actual": round(seconds, 2) for name, seconds in actual.items()},
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }  # fmt: skip


def error(row: Mapping[str, Any], found: str, actual: str) -> float:
    """Relative."""
    return float(row[found]) / float(row[actual]) - 1


ERRORS = (
    ("before", "actual"),
    ("after", "actual"),
    ("step_before", "step_actual"),
    ("step_after", "step_actual"),
)
TITLES = ("run, before", "run, after", "step, before", "step, after")


def parts_of(row: Mapping[str, Any]) -> str:
    """Predicted and actual seconds of each part of a run."""
    names = [
        name.removesuffix("_before") for name in row if name.endswith("_before") and name != "step_before"
    ]
    return "    " + ", ".join(f"{name} {row[f'{name}_before']} / {row[f'{name}_actual']}" for name in names)


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line for each run, and the medians."""
    lines: list[tuple[object, ...]] = [
        (
            row["name"], f"{float(row['actual']):.1f}", f"{float(row['before']):.1f}",
            *(f"{100 * error(row, *pair):+.0f} %" for pair in ERRORS),
        )
        for row in rows
    ]  # fmt: skip
    absolute = [[abs(error(row, *pair)) for row in rows] for pair in ERRORS]
    lines.append(("**median**", "", "", *(f"{100 * statistics.median(each):.1f} %" for each in absolute)))
    lines.append(("**worst**", "", "", *(f"{100 * max(each):.0f} %" for each in absolute)))
    return markdown(("configuration", "seconds", "predicted", *TITLES), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[config.name for config in CONFIGS], metavar="NAME")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    parser.add_argument("--bases", type=Path, help="a folder for bases with random weights, kept")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = []
    where = results.where(__file__, "torch", "transformers", "graftlm")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.bases or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for config in CONFIGS:
            if given.only is None or config.name in given.only:
                row = measured(config, folder)
                found.append(row)
                print(show([row]).splitlines()[2], flush=True)
                print(parts_of(row), flush=True)
                if given.keep:
                    results.append(RESULTS, [{**row, **where}])
    print(f"\n{show(found)}")


if __name__ == "__main__":
    main()
