"""A small but complete training set-up: a random Llama with adapters and real dropout, rows, an objective."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme
from graftlm.training.interfaces import HeldOut

VOCABULARY = 32


@dataclass(frozen=True)
class Settings:
    """Small defaults for everything the loop reads."""

    num_train_epochs: float = 2
    max_steps: int | None = None
    gradient_accumulation_steps: int = 2
    learning_rate: float = 5e-3
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    loraplus_lr_ratio: float | None = None
    optim: str = "adamw"
    save_steps: int | None = 2
    save_total_limit: int = 2
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    seed: int = 7


class Adapted(nn.Module):
    """A frozen linear with a low-rank change behind dropout."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float, scheme: Scheme | None = None) -> None:
        super().__init__()
        self.base = base.requires_grad_(False) if scheme is None else packed(base, scheme)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.lora_A.T @ self.lora_B.T


def packed(layer: nn.Linear, scheme: Scheme) -> QuantisedLinear:
    return QuantisedLinear(encode(layer.weight.detach(), scheme), None, layer.weight.dtype)


def make_model(
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 16,
    rank: int = 2,
    quantization: str = "none",
) -> LlamaForCausalLM:
    torch.manual_seed(3)
    scheme = None if quantization == "none" else Scheme.parse(quantization)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=dropout,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name), rank, dropout, scheme))
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj, rank, dropout, scheme)
        layer.input_layernorm.weight.requires_grad_(True)  # a vector among the matrices
    return model.to(dtype).eval()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: item for name, item in model.named_parameters() if item.requires_grad}


@dataclass(frozen=True)
class RowBatch:
    inputs: dict[str, Tensor]
    labels: Tensor
    target_tokens: int
    real_tokens: int
    rows: tuple[int, ...]


def make_rows(count: int, seed: int = 11) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt, which is not trained on), of very unequal lengths."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.choice([5, 9, 14, 30])
        rows.append(([draw.randrange(VOCABULARY) for _ in range(length)], draw.randrange(1, length - 1)))
    return rows


def collate(rows: list[tuple[list[int], int]], numbers: list[int]) -> RowBatch:
    longest = max(len(rows[number][0]) for number in numbers)
    ids = torch.zeros(len(numbers), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, number in enumerate(numbers):
        tokens, prompt = rows[number]
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
        labels[index, prompt : len(tokens)] = torch.tensor(tokens[prompt:], dtype=torch.long)
    targets = int((labels != -100).sum())
    numbers_shown = tuple(number + 1 for number in numbers)
    return RowBatch(
        {"input_ids": ids, "attention_mask": mask}, labels, targets, int(mask.sum()), numbers_shown
    )


class RowBatches:
    """Micro-batches of two rows, shuffled as a pure function of (seed, epoch)."""

    def __init__(self, rows: list[tuple[list[int], int]], seed: int = 7, per_batch: int = 2) -> None:
        self.rows, self.seed, self.per_batch = rows, seed, per_batch
        self.fingerprint = hashlib.sha256(repr((rows, seed, per_batch)).encode()).hexdigest()
        self.served: list[tuple[int, ...]] = []

    def count(self, epoch: int) -> int:
        return -(-len(self.rows) // self.per_batch)

    def batch(self, epoch: int, index: int) -> RowBatch:
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        made = collate(self.rows, order[index * self.per_batch : (index + 1) * self.per_batch])
        self.served.append(made.rows)
        return made


@dataclass(frozen=True)
class Parts:
    loss_sum: Tensor
    target_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def objective(model: nn.Module, batch: RowBatch) -> Parts:
    """Next-token cross-entropy, summed; also moves Python's random state, which must survive a resume."""
    if model.training:
        random.random()
    logits = model(**batch.inputs, use_cache=False).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = functional.cross_entropy(
        wide[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return Parts(loss, batch.target_tokens)


def make_evaluate(model: nn.Module, every_batch: Callable[[], None] = lambda: None) -> Any:
    """Held-out loss over a few rows; draws random numbers, as an evaluation may."""
    held_out = RowBatches(make_rows(6, seed=99))

    def evaluate(stop_asked: Callable[[], bool]) -> HeldOut | None:
        loss, tokens = 0.0, 0
        for index in range(held_out.count(0)):
            every_batch()
            if stop_asked():
                return None
            torch.rand(1)
            parts = objective(model, held_out.batch(0, index))
            loss, tokens = loss + float(parts.loss_sum), tokens + parts.target_tokens
        return HeldOut(loss / tokens, tokens, len(held_out.rows))

    return evaluate


def contents(run: Path) -> dict[str, bytes]:
    """The newest checkpoint's files, but for what names the process (the manifest's facts do not)."""
    newest = max((run / "checkpoints").glob("step-??????"))
    return {path.name: path.read_bytes() for path in newest.iterdir()}
