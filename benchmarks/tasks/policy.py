"""Policies that learn from rewards: sums with a checkable answer, on a base that gets some of them right.

    python benchmarks/tasks/policy.py            every case that the results file does not have
    python benchmarks/tasks/policy.py --table    what was measured so far

The embedded base adds badly. 300 sums by supervised tuning teach it the form of an answer (about one in ten
is then right); merged, it is the base of every case. The policies see 1,200 other sums and are told only
whether an answer is right. The 200 held-out sums are in neither part. `reward` is the share of them that the
likeliest answer gets right, `kl` the distance from the base in nats per token along drawn answers.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.task_case import TaskCase
from task_runs import main, with_seeds

BASE, DATA = "sprout, tuned on 300 sums", "sums of 10 to 60"
PARTS = {"eval": 200, "first": 300, "train": 1200}
STEPS, RATE = 160, 1e-3
ANSWERS = {"max_completion_length": 8, "rewards": "exact_match"}


def make_data(folder: Path) -> None:
    """Sums that are in one part only, the same in every process."""
    draw, seen = random.Random(2), set[tuple[int, int]]()
    for part, count in PARTS.items():
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            pair = draw.randint(10, 60), draw.randint(10, 60)
            if pair not in seen:
                seen.add(pair)
                rows.append({"question": f"What is {pair[0]} + {pair[1]}?", "answer": str(sum(pair))})
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_base(folder: Path) -> None:
    """The embedded base after supervised tuning on the first sums."""
    run, graft = folder / "run", [sys.executable, "-m", "graftlm"]
    data = [str(folder / "first.jsonl"), "--set", f"data.eval_path={folder / 'eval.jsonl'}"]
    settings = ["--set", "train.num_train_epochs=6", "--set", "output.report_to=none"]
    subprocess.run([*graft, "tune", *data, "--model", "sprout", "--out", str(run), *settings], check=True)
    subprocess.run([*graft, "merge", str(run), "--out", str(folder / "base")], check=True)


def cases(folder: Path) -> list[TaskCase]:
    """The policies, with what each of them is told."""

    def case(task: str, method: str, **settings: Any) -> TaskCase:
        recipe = {
            "model": {"name": str(folder / "base")},
            "data": {"eval_path": str(folder / "eval.jsonl")},
            "task": {"type": task, **ANSWERS, **settings},
            "train": {"max_steps": STEPS, "learning_rate": RATE},
        }
        return TaskCase(task, BASE, DATA, method, recipe, path=folder / "train.jsonl")

    return [
        *with_seeds([case("grpo", "lora", beta=0.02)]),
        case("rloo", "lora", num_generations=8),
        case("ppo", "lora", num_generations=8, num_ppo_epochs=1),
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        if "--table" not in sys.argv:
            make_data(Path(scratch))
            make_base(Path(scratch))
        main(__doc__, "policy", cases(Path(scratch)))
