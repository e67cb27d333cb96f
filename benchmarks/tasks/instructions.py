"""Instruction tuning: small causal bases learn to answer with the tool call that an instruction asks for."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.task_case import TaskCase
from task_runs import main, with_seeds

RECIPE = {
    "data": {"eval_path": "gpteacher-toolformer/eval.jsonl", "max_length": 256},
    "train": {"max_steps": 40},
    "eval": {"metrics": ["loss"]},
}
METHODS = {
    "lora": {"type": "lora", "r": 16, "target_modules": "all-linear"},
    "qlora": {"type": "qlora", "r": 16, "target_modules": "all-linear"},
}
CASES = with_seeds(
    TaskCase("sft", "gpt2-tiny-en", "gpteacher-toolformer/train.jsonl", name, {**RECIPE, "method": method})
    for name, method in METHODS.items()
)

if __name__ == "__main__":
    main(__doc__, "instructions", CASES)
