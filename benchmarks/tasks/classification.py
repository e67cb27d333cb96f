"""Intent classification and sentiment with a small encoder: methods side by side with full fine-tuning.

    python benchmarks/tasks/classification.py [--jobs N] [--only TEXT] [--seeds N] [--table]

banking77 (77 intents of bank customers) and sentence-polarity (film reviews, positive or negative) with
roberta-tiny-en; qlora on the base in 4 bits. 300 steps of 32 rows, learning rates as Graft fits them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.task_case import TaskCase
from task_runs import main, with_seeds

METHODS = ("lora", "full", "bottleneck", "ia3", "qlora")
DATA = {"banking77/train.csv": METHODS, "sentence-polarity/train.jsonl": ("lora", "full")}
TRAIN = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "max_steps": 300}


def case(data: str, method: str) -> TaskCase:
    """One method on one data set."""
    recipe: dict[str, Any] = {
        "data": {"eval_path": data.replace("train.", "eval.")},
        "train": {**TRAIN, "eval_steps": 300},
    }
    return TaskCase("classification", "roberta-tiny-en", data, method, recipe)


CASES = with_seeds([case(data, method) for data, methods in DATA.items() for method in methods])

if __name__ == "__main__":
    main(__doc__, "classification", CASES)
