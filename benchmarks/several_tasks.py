"""What several tasks in one run cost beside a run for each: processor time and memory of whole runs.

    python benchmarks/several_tasks.py [--steps N]

Intents and politeness (examples/recipes/data) on the embedded base. Every run loads the base, measures it,
trains, measures again and proves the adapter; the joint run loads the base once. Processor seconds are those
of the run's process, which other work on the machine hardly changes; rows go to results/several_tasks.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from harness import results

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "recipes" / "data"
TASKS = {
    "intent": {"task": "classification", "data": {"path": str(DATA / "intents.jsonl")}},
    "politeness": {"task": "reward", "data": {"path": str(DATA / "polite.jsonl")}},
}
FILE = results.FOLDER / "several_tasks.csv"


def recipe(steps: int, **task: Any) -> dict[str, Any]:
    """Settings that every run has, beside what is learnt."""
    data = {"max_length": 64, **task.pop("data", {})}
    train = {
        "max_steps": steps, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1,
        "eval_steps": 10_000, "save_steps": 10_000,
    }  # fmt: skip
    shared = {"model": {"name": "sprout", "dtype": "float32"}, "train": train}
    return {**shared, "data": data, "output": {"report_to": "none"}, **task}


def run(name: str, steps: int, content: dict[str, Any]) -> dict[str, Any]:
    """Tune in a process of its own; what it took.

    Raises:
        SystemExit: the run failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path, log = Path(scratch) / "recipe.yaml", Path(scratch) / "log"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        words = [sys.executable, "-m", "graftlm", "tune", str(path), "--out", str(Path(scratch) / "run")]
        with log.open("wb") as output:
            places = [(os.POSIX_SPAWN_DUP2, output.fileno(), number) for number in (1, 2)]
            process = os.posix_spawn(words[0], words, os.environ, file_actions=places)
            _, status, usage = os.wait4(process, 0)
        if not (Path(scratch) / "run" / "report.json").is_file():
            raise SystemExit(f"{name}: {status}\n{log.read_text()[-2000:]}")
    return {
        "run": name, "steps": steps, "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024, "machine": results.machine(),
        "versions": results.versions("torch", "transformers", "graftlm"), "date": results.today(),
    }  # fmt: skip


def main() -> None:
    """Run all, keep the rows, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each task")
    steps = parser.parse_args().steps
    joint = {"type": "multi", "sampling": "equal", "tasks": TASKS}
    rows = [run("together", len(TASKS) * steps, recipe(len(TASKS) * steps, task=joint))]
    rows += [run(name, steps, recipe(steps, **task)) for name, task in TASKS.items()]
    results.append(FILE, rows)
    alone = sum(row["cpu_seconds"] for row in rows[1:])
    together = rows[0]["cpu_seconds"]
    print(f"processor time: together {together:.1f} s, one by one {alone:.1f} s: {together / alone:.2f}x")
    for row in rows:
        print(f"{row['run']}: {row['cpu_seconds']} s, {row['peak_bytes'] / 2**20:,.0f} MiB at most")


if __name__ == "__main__":
    main()
