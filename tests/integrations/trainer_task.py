"""A tiny training task for trainers of transformers and TRL; as a program, one run of it.

`python trainer_task.py FOLDER KIND [CHECKPOINT]` trains into FOLDER, from CHECKPOINT if given, and leaves the
adapter's tensors in FOLDER/final.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from graftlm.formats.layout import FOLDER
from graftlm.integrations import peft_api
from graftlm.integrations.hf_trainer import GraftTrainer
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig

SETTINGS = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def base() -> Any:
    """A tiny Llama, the same each time, with dropout in its attention so that random states matter."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SETTINGS, attention_dropout=0.1)
    return transformers.LlamaForCausalLM(config)


def wrapped(library: Any = peft_api) -> Any:
    """The base with a LoRA by PEFT's names, from PEFT or from here."""
    torch.manual_seed(1)
    return library.get_peft_model(base(), library.LoraConfig(**LORA, task_type="CAUSAL_LM"))


def attached(**changes: Any) -> Any:
    """The base with a LoRA by `attach`."""
    model = base()
    torch.manual_seed(1)
    attach(model, LoraConfig(**{**LORA, **changes}), storage=FOLDER)
    return model


def rows(count: int = 48, seed: int = 0) -> datasets.Dataset:
    """Token sequences with something to learn: each next token is a fixed step away."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (count, 1), generator=generator)
    step = torch.randint(1, 4, (count, 1), generator=generator)
    ids = (start + step * torch.arange(10)) % 40 + 3
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    """12 steps of 4 rows, a checkpoint every 4."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return transformers.TrainingArguments(**settings | changes)


def losses(trainer: Any) -> list[float]:
    """Training losses by step, as the trainer logged them."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(folder: str, kind: str, checkpoint: str | None = None) -> None:
    if kind == "projected":  # a file holds less than what is trained
        model = base()
        attach(model, PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True), storage=FOLDER)
    else:
        model = attached(lora_dropout=0.2) if kind == "attached" else wrapped()
    trainer_class = transformers.Trainer if kind == "plain" else GraftTrainer
    trainer = trainer_class(model=model, args=arguments(Path(folder)), train_dataset=rows())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(Path(folder) / "final"))


if __name__ == "__main__":
    main(*sys.argv[1:])
