"""Runs with nothing wrong: defaults of Graft on real data, methods and tasks of all kinds."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from case import write_rows

from graftlm.verbs.tune import tune

ROWS, HELD_OUT, STEPS = 400, 60, 40
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.eval_steps=10",
    "output.report_to=none",
    "eval.before_after=false",
)
"""The base is not measured: bases as small as these forget much of what they knew whenever they are tuned,
which is no false alarm (D24)."""


@dataclass(frozen=True)
class Clean:
    """One run: a data set, a base and a method as a recipe names them."""

    data: str
    base: str
    method: str
    task: str = "sft"
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = (f"{self.method} on {self.base}", self.data, self.task, *self.settings)
        return ", ".join(words)

    def make(self, folder: Path, shared: Path) -> Path:
        """The run folder."""
        rows = _rows(shared / "data" / self.data)
        train = write_rows(folder / "train.jsonl", rows[:-HELD_OUT])
        held_out = write_rows(folder / "eval.jsonl", rows[-HELD_OUT:])
        base = self.base if self.base == "sprout" else str(shared / "models" / self.base)
        out = folder / "run"
        settings = (*SETTINGS, *self.settings, f"data.eval_path={held_out}")
        tune(train, model=base, method=self.method, task=self.task, out=out, overrides=settings)
        return out


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Rows spread over the file, so that neighbours which repeat each other are apart."""
    found: list[dict[str, Any]] = []
    for name in ("train.jsonl", "train.csv", "seed_tasks.jsonl", "dpo_en_demo.json"):
        path = folder / name
        if path.is_file():
            found += _read(path)
    needed = ROWS + HELD_OUT
    stride = max(1, len(found) // needed)
    return found[::stride][:needed]


def _read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".json":
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line]


CLEAN = (
    *(Clean(data, base, method) for data, base in (("wikisql", "gpt2-tiny-en"), ("gsm8k", "sprout"))
      for method in ("lora", "dora", "ia3", "bottleneck", "full")),
    *(Clean("wikisql", "stories260K", method) for method in ("lora", "dora", "ia3", "bottleneck")),
    Clean("gsm8k", "sprout", "qlora", settings=("model.quantization=nf4",)),
    Clean("gsm8k", "sprout", "qlora", settings=("model.quantization=int8",)),
    *(Clean("wikisql", "gpt2-tiny-en", "lora", settings=(f"method.r={r}",)) for r in (2, 8, 64)),
    *(Clean("wikisql", "gpt2-tiny-en", "lora", settings=(f"train.seed={seed}",)) for seed in (1, 2, 3, 4)),
    Clean("gsm8k", "sprout", "lora", settings=("model.dtype=float32",)),
    Clean("gsm8k", "sprout", "lora", settings=("model.dtype=bfloat16",)),
    Clean("gsm8k", "sprout", "lora", settings=("method.use_rslora=true",)),
    Clean("gsm8k", "sprout", "lora", settings=("method.lora_dropout=0.1",)),
    *(Clean("sentence-polarity", base, method, "classification")
      for base in ("roberta-tiny-en", "sprout") for method in ("lora", "ia3")),
    Clean("preference-demo", "sprout", "lora", "dpo"),
    Clean("hh-harmless", "sprout", "lora", "reward"),
)  # fmt: skip
