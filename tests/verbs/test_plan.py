"""The plan's choices act on the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.load import load_model
from graftlm.training.recipe import make_recipe
from graftlm.verbs.plan import use_checkpointing


def gradients(asked: str) -> tuple[dict[str, torch.Tensor], str]:
    torch.manual_seed(0)
    model: Any
    model, _ = load_model("sprout", dtype="float32")
    recipe = make_recipe({"model": "sprout", "data": "rows.jsonl"}, [f"train.gradient_checkpointing={asked}"])
    adapters = attach(model, LoraConfig(r=2, init_lora_weights=False), storage=FOLDER)
    choice = use_checkpointing(model, recipe)
    model.train()
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {key: p.grad for key, p in adapters.named_parameters("default").items() if p.grad is not None}
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == (
        choice.policy == "recompute"
    )
    return found, choice.policy


def test_recomputing_gives_the_same_gradients() -> None:
    kept, policy = gradients("false")
    recomputed, other_policy = gradients("true")
    assert (policy, other_policy) == ("keep", "recompute")
    assert kept.keys() == recomputed.keys()
    for key, gradient in kept.items():
        torch.testing.assert_close(recomputed[key], gradient)


@pytest.mark.parametrize("asked", ["auto"])
def test_a_small_model_keeps_its_activations(asked: str) -> None:
    assert gradients(asked)[1] == "keep"
