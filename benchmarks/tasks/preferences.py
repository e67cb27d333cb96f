"""Preferences: DPO, IPO, SimPO, ORPO and KTO on real pairs with a small GPT-2, and DPO on a base in 4 bits.

    python benchmarks/tasks/preferences.py [--jobs N] [--only TEXT] [--seeds N] [--table]

hh-harmless: which of two answers people found less harmful; 40 steps of 16 of its 1,609 usable pairs, 300
pairs held out. preference-demo: 150 answers marked good and 150 marked bad, 30 held out; one epoch. The base
is its own reference: its reward accuracy is one half by definition, and its KL zero. A base this small wants
a higher learning rate than Graft fits for preferences.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.task_case import TaskCase
from task_runs import main, with_seeds

HARMLESS = "hh-harmless/train.jsonl"
MARKED = "preference-demo/kto_en_demo.json"
TRAIN = {"max_steps": 40, "eval_steps": 40, "learning_rate": 1e-3}


def case(task: str, method: str = "lora", data: str = HARMLESS, **train: Any) -> TaskCase:
    """One task with one method."""
    recipe: dict[str, Any] = {
        "data": {"bad_rows": "skip"},
        "train": {**TRAIN, **train},
        "method": {"type": method},
        "task": {"type": task},
    }
    if data == HARMLESS:
        recipe["data"]["eval_path"] = "hh-harmless/eval.jsonl"
    return TaskCase(task, "gpt2-tiny-en", data, method, recipe)


CASES = [
    *with_seeds([case("dpo")]),
    case("dpo", "qlora"),
    case("kto", data=MARKED, max_steps=17),
    case("orpo"),
]

if __name__ == "__main__":
    main(__doc__, "preferences", CASES)
