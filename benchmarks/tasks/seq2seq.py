"""An encoder-decoder that knows American pronunciation learns the British one, by LoRA and QLoRA."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.task_case import TaskCase
from task_runs import main, with_seeds

RECIPE = {
    "data": {"eval_path": "g2p-english/eval.jsonl", "format": "source_target(word, gb)"},
    "train": {"max_steps": 200, "per_device_train_batch_size": 64},
    "eval": {"metrics": ["exact_match", "character_error_rate"]},
}
LORA = {"r": 16, "target_modules": "all-linear"}
METHODS = {"lora": {"type": "lora", **LORA}, "qlora": {"type": "qlora", **LORA}}
CASES = with_seeds(
    TaskCase("seq2seq", "g2p-bart-us", "g2p-english/train.jsonl", name, {**RECIPE, "method": method})
    for name, method in METHODS.items()
)

if __name__ == "__main__":
    main(__doc__, "seq2seq", CASES)
