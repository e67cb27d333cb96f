"""Reward model on human preferences: which of two dialogues is the harmless one.

    python benchmarks/tasks/reward.py [--jobs N] [--only TEXT] [--seeds N] [--table]

hh-harmless with gpt2-tiny-en, one epoch, dialogues cut to their last 160 tokens. The model is small and was
trained on novels: what it can tell of such dialogues is little.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.task_case import TaskCase
from task_runs import main, with_seeds

BASE, DATA = "gpt2-tiny-en", "hh-harmless/train.jsonl"


def case(method: str, name: str = "", **model: Any) -> TaskCase:
    """One method; `name` where the method's type does not say it."""
    recipe: dict[str, Any] = {
        "data": {"eval_path": "hh-harmless/eval.jsonl", "max_length": 160, "bad_rows": "skip"},
        "train": {"num_train_epochs": 1, "learning_rate": 1e-3, "eval_steps": 1000},
        "method": {"type": method},
    }
    if model:
        recipe["model"] = model
    return TaskCase("reward", BASE, DATA, name or method, recipe)


CASES = with_seeds([case("lora")])

if __name__ == "__main__":
    main(__doc__, "reward", CASES)
