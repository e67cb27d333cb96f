"""Losses and gradients of several adapters from one pass, against a pass for each."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from graftlm.core.errors import ModelError
from graftlm.core.seeding import seed_everything
from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.data.labels.encode import LabelledRow, collate_labelled
from graftlm.data.labels.records import Labelled
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.classification import ClassificationObjective
from graftlm.objectives.sft import SftObjective
from graftlm.testing.models import tiny

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip


def classifier(kind: str) -> Any:
    """A random one; the encoder drops nothing."""
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**SIZES)).eval()
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZES, **rates)).eval()


def labelled(count: int, seed: int) -> Any:
    """A batch of so many rows."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        ids = tuple(draw.randrange(3, 32) for _ in range(draw.choice([5, 9, 13])))
        target = tuple(float(label == number % 3) for label in range(3))
        rows.append(LabelledRow(ids, (), target, Labelled(("",), (), number), False))
    return collate_labelled(rows, 0, 64, "one label")


def texts(count: int, seed: int) -> Any:
    """A batch of packed windows."""
    draw = random.Random(seed)
    rows = [tuple(draw.randrange(3, 32) for _ in range(draw.choice([5, 9, 13]))) for _ in range(2 * count)]
    encoded = [Encoded(ids, (-100, -100, *ids[2:]), number, False) for number, ids in enumerate(rows)]
    layout: dict[str, Any] = {"max_length": 30, "packing": True, "seed": 0, "pad_token_id": 0}
    return Batches(encoded, rows_per_batch=count, **layout).batch(0, 0)


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("kind", ["llama", "bert", "text", "gpt2"])
def test_losses_and_gradients_are_those_of_a_pass_for_each(kind: str, is_fused: bool) -> None:
    is_text = kind in ("text", "gpt2")
    model = tiny("llama" if kind == "text" else kind) if is_text else classifier(kind)
    head = {} if is_text else {"modules_to_save": ("classifier" if kind == "bert" else "score",)}
    seed_everything(1)
    adapters = attach(model, LoraConfig(r=3, init_lora_weights=False, **head), "a", storage=FOLDER)
    adapters.add("b", LoraConfig(r=2, init_lora_weights=False, target_modules="attention", **head))
    adapters.add("c", IA3Config(init_ia3_weights=False, **head))
    names = ["a", "b", "c"]
    adapters.train_only(names)
    objective: Any = SftObjective(model) if is_text else ClassificationObjective(model, "one label")
    make = texts if is_text else labelled
    batches = {name: make(2 + number, number) for number, name in enumerate(names)}
    parts = fusable(model)
    with adapters.stacked(names) as lanes:
        if is_fused:
            parts = fusable(model)
        with fused(parts if is_fused else type(parts)(())):
            found = objective.together(model, batches, lanes)
            with lanes.again():
                sum(parts.loss_sum for parts in found.values()).backward()
    mine = {name: {key: item.grad for key, item in adapters.named_parameters(name).items()} for name in names}
    model.zero_grad()
    for name in names:
        with adapters.activated(name), fused(parts if is_fused else type(parts)(())):
            alone = objective(model, batches[name])
            alone.loss_sum.backward()
        assert found[name].target_tokens == alone.target_tokens
        torch.testing.assert_close(found[name].loss_sum, alone.loss_sum, rtol=1e-5, atol=1e-5)
        for key, parameter in adapters.named_parameters(name).items():
            near = 1e-4 * float(parameter.grad.abs().max())
            torch.testing.assert_close(mine[name][key], parameter.grad, rtol=1e-5, atol=near)


def test_a_head_that_is_adapted_is_refused() -> None:
    model = tiny("llama")
    adapters = attach(model, LoraConfig(r=2, target_modules=("lm_head",)), "a", storage=FOLDER)
    objective = SftObjective(model)
    with adapters.stacked(["a"]) as lanes, pytest.raises(ModelError, match="output head"):
        objective.together(model, {"a": texts(1, 0)}, lanes)
