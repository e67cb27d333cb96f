"""Ten steps of `transformers.Trainer` on a PEFT model, on exactly the batches that we see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from graftlm.objectives.base import LossParts

RATE = 1e-2


class Fixed(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Whole batches as items."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(self.batches[index])


def trained_there(
    model: Any, batches: Sequence[Mapping[str, Tensor]], folder: Path, smoothing: float = 0.0
) -> list[float]:
    """Losses of `Trainer`; `batches` hold the model's inputs and `labels`."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=len(batches), learning_rate=RATE, lr_scheduler_type="constant",
        per_device_train_batch_size=1, logging_steps=1, report_to=[], save_strategy="no", max_grad_norm=0.0,
        label_smoothing_factor=smoothing, optim="adamw_torch", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Fixed(batches), data_collator=lambda rows: dict(rows[0])
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_here(
    parameters: Sequence[Tensor], loss: Callable[[Any], LossParts], batches: Sequence[Any]
) -> list[float]:
    """Losses of our objective and plain AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses = []
    for batch in batches:
        found = loss(batch)
        mean = found.loss_sum / found.target_tokens
        optimizer.zero_grad()
        mean.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(mean.detach()))
    return losses


def start_equally(ours: Mapping[str, Tensor], theirs: Any) -> None:
    """Give our LoRA the random start of theirs; every one of our factors gets one of theirs."""
    start = {_place(name): value for name, value in theirs.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in ours.items():
            if "lora_" in name:
                parameter.copy_(start.pop(_place(name)))
    assert not start


def _place(name: str) -> tuple[str, str]:
    """Path of the layer and which factor it is, whatever else a tool puts into the name."""
    name = name.replace("base_model.model.", "")
    others = ("weight", "default", "parts", "adapters", "@default")
    words = [word for word in name.split(".") if word not in others]
    factor = "A" if any("lora_A" in word for word in words) else "B"
    return ".".join(word for word in words if "lora_" not in word), factor
