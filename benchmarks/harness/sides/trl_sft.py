"""TRL's `SFTTrainer`: its own loop, collator and loss, on the same examples in the same steps."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from harness.case import Case
from harness.measurement import Recorder
from harness.writer import ADAPTER, BASE, Example, lengths, per_step

MICRO_BATCH = 4
"""Examples of a forward pass where they are sorted by length."""


def train(case: Case, ways: frozenset[str], folder: Path, recorder: Recorder) -> None:
    """Load, attach, and let the Trainer train. The ways are those of `sides/registry.py`."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import PeftModel

    trl: Any = importlib.import_module("trl")
    recorder.imported()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / BASE, dtype=torch.bfloat16, device_map=case.device, attn_implementation="sdpa"
    )
    recorder.base(model)
    is_16_bit = "16-bit" in ways
    model = PeftModel.from_pretrained(
        model, folder / ADAPTER, is_trainable=True, autocast_adapter_dtype=not is_16_bit
    )
    steps = per_step(case, folder)
    size = len(steps[0])
    micro = min(MICRO_BATCH, size) if "sorted" in ways else size
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=size // micro,
            max_steps=case.steps,
            max_length=None if "padding free" in ways else case.length,
            padding_free="padding free" in ways,
            learning_rate=case.rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=not is_16_bit,
            gradient_checkpointing=case.recompute == "everything",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=case.device == "cpu",
            dataloader_pin_memory=case.device != "cpu",
        ),
        train_dataset=Dataset.from_list(columns(steps, in_order="sorted" in ways)),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / BASE),
        callbacks=[watcher(recorder, lengths(steps))],
    )
    trainer.train()


def columns(steps: list[list[Example]], *, in_order: bool) -> list[dict[str, Any]]:
    """The examples of all steps; those of a step the longest last, if so wanted."""
    found = [sorted(step, key=lambda example: len(example[0])) if in_order else step for step in steps]
    return [{"input_ids": ids, "labels": labels} for step in found for ids, labels in step]


def watcher(recorder: Recorder, tokens: list[int]) -> Any:
    """A callback that records every step by the Trainer's own log."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                norm = float(logs.get("grad_norm", math.nan))
                recorder.step(float(logs["loss"]), norm, tokens[state.global_step - 1])

    return Watcher()
