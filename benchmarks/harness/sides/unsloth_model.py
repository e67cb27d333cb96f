"""Unsloth's `FastLanguageModel`, with the step of the Trainer. CUDA only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from harness.case import Case
from harness.measurement import Recorder
from harness.writer import BASE, per_step

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(case: Case, ways: frozenset[str], folder: Path, recorder: Recorder) -> None:
    """Load, attach, and take all steps. Unsloth loads from folders: the model is written there first."""
    unsloth: Any = importlib.import_module("unsloth")  # before transformers, which it changes
    import torch

    from harness.on_device import random_model, start_alike

    recorder.imported()
    path = folder / BASE
    if not path.is_dir():
        from graftlm.models.load import load_tokenizer

        model = random_model(case)
        model.save_pretrained(path)
        load_tokenizer("sprout").save_pretrained(path)
        del model
        torch.cuda.empty_cache()
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(path), max_seq_length=case.length, dtype=torch.bfloat16, load_in_4bit="4 bits" in ways
    )
    recorder.base(model)
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=case.rank, lora_alpha=2 * case.rank, lora_dropout=0.0, target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if case.recompute == "everything" else False,
    )  # fmt: skip
    start_alike((name, each) for name, each in model.named_parameters() if ".lora_A." in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.rate, weight_decay=0.0, fused=True)
    model.train()
    data = [torch.tensor([ids for ids, _ in step]) for step in per_step(case, folder)]
    recorder.begin()
    for rows in data:
        rows = rows.to(case.device)
        with torch.autocast(case.device, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.step(loss.item(), norm.item(), rows.numel())
