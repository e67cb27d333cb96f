"""Several tasks in one run, an adapter for each or one for both, beside each task in a run of its own.

    python benchmarks/tasks/multi.py [--jobs N] [--only TEXT] [--seeds N] [--table]

Intents of bank customers (banking77) and sentiment of film reviews (sentence-polarity) with roberta-tiny-en:
60 steps of 32 rows for each task, together or alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.task_case import TaskCase
from harness.writer import SHARED
from task_runs import main, with_seeds

BASE, STEPS = "roberta-tiny-en", 60
FILES = {"intent": "banking77/train.csv", "sentiment": "sentence-polarity/train.jsonl"}
TRAIN = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "eval_steps": 1000}


def data(name: str) -> dict[str, str]:
    """Rows to train on and rows held out."""
    path = SHARED / "data" / FILES[name]
    return {"path": str(path), "eval_path": str(path.with_name(path.name.replace("train.", "eval.")))}


def together(adapters: str) -> TaskCase:
    """Both tasks in one run."""
    tasks = {name: {"task": "classification", "data": data(name)} for name in FILES}
    recipe: dict[str, Any] = {
        "task": {"type": "multi", "adapters": adapters, "sampling": "equal", "tasks": tasks},
        "train": {**TRAIN, "max_steps": STEPS * len(FILES)},
        "method": {"type": "lora"},
    }
    return TaskCase("multi", BASE, " + ".join(FILES.values()), f"lora, {adapters.replace('_', ' ')}", recipe)


def alone(name: str) -> TaskCase:
    """One task in a run of its own."""
    recipe = {
        "task": "classification",
        "data": {"eval_path": data(name)["eval_path"]},
        "train": {**TRAIN, "max_steps": STEPS},
        "method": {"type": "lora"},
    }
    return TaskCase("multi", BASE, FILES[name], "lora, alone", recipe)


CASES = with_seeds([together("one_each"), together("shared"), *(alone(name) for name in FILES)])

if __name__ == "__main__":
    main(__doc__, "multi", CASES)
