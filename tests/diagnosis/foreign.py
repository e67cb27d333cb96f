"""Adapters and rows as the users of other libraries make them, on the embedded base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
)

from graftlm.models.sprout import sprout_folder

STEPS = 3
TEXT = "A farmer sold 12 apples and 7 pears in the morning."
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]

Settings = Callable[[Any], list[torch.nn.Parameter]]


def base_model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(sprout_folder())


def tokenizer_of(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})


def with_lora(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora(**settings))


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def train(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Any] | None = None) -> None:
    """A few steps as people write them."""
    if inputs is None:
        ids = tokenizer_of(sprout_folder())(TEXT, return_tensors="pt")["input_ids"]
        inputs = {"input_ids": ids, "labels": ids}
    model.train()
    for _ in range(STEPS):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peft_adapter(folder: Path, **settings: Any) -> Path:
    """A trained adapter, saved."""
    model = with_lora(base_model(), **settings)
    train(model, optimizer_of(model))
    model.save_pretrained(folder)
    return folder


def collated(rows: Sequence[dict[str, str]], base: Path, *, pad: str) -> list[dict[str, list[int]]]:
    """Rows with their end token as the collator of causal language models hands them over."""
    tokenizer = tokenizer_of(base)
    tokenizer.pad_token = pad
    texts = [f"{row['prompt']}\n{row['completion']}{tokenizer.eos_token}" for row in rows]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(text) for text in texts])
    columns = {name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def edited_base(folder: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy of the embedded base whose `tokenizer_config.json` and `tokenizer.json` were edited."""
    base = folder / "base"
    if not base.exists():
        shutil.copytree(sprout_folder(), base)
    paths = (base / "tokenizer_config.json", base / "tokenizer.json")
    config, tokenizer = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    edit(config, tokenizer)
    for path, content in zip(paths, (config, tokenizer), strict=True):
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return base
