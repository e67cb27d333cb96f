"""Which runs can share their passes, and when that pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stack_rig import base
from torch import nn

from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.objectives.sft import SftObjective
from graftlm.training.stacking_choice import obstacle, worth_stacking

CPU = {"device": torch.device("cpu"), "policy": "nothing", "activation_bytes": 2**20, "free_bytes": 2**33}


@pytest.mark.parametrize("config", [LoraConfig(use_dora=True), IA3Config(), BottleneckConfig()])
def test_what_acts_on_layers_can(config: MethodConfig) -> None:
    model = base()
    assert obstacle(model, SftObjective(model), config) is None


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (PrefixTuningConfig(num_virtual_tokens=2), "more than single layers"),
        (BottleneckConfig(dropout=0.1), "bottleneck"),
        (LoraConfig(target_modules=("q_proj", "lm_head")), "output head is adapted"),
    ],
)
def test_what_acts_on_more_cannot(config: MethodConfig, why: str) -> None:
    model = base()
    assert why in (obstacle(model, SftObjective(model), config) or "")


def test_a_base_that_drops_values_or_a_loss_of_another_kind_cannot() -> None:
    model = base()
    objective = SftObjective(model)
    assert "its loss" in (obstacle(model, lambda model, batch: None, LoraConfig()) or "")
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert "random" in (obstacle(model, objective, LoraConfig()) or "")
    model = base()
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, nn.Dropout(0.1))
    assert "random" in (obstacle(model, objective, LoraConfig()) or "")


@pytest.mark.parametrize(
    ("tokens", "changes", "together", "why"),
    [
        ([128] * 5, {}, 5, "leave most of a pass"),
        ([128] * 50, {}, 16, "leave most of a pass"),
        ([128], {}, 1, "one run"),
        ([128, 4096], {}, 1, "busy by themselves"),
        ([4096] * 4, {"device": torch.device("cuda")}, 4, "leave most of a pass"),
        ([128] * 5, {"policy": "everything"}, 1, "memory is short"),
        ([128] * 5, {"activation_bytes": 2**31}, 3, "room for the activations of 3"),
        ([128] * 5, {"activation_bytes": 2**35}, 1, "room for the activations of 1"),
        ([128] * 5, {"activation_bytes": 2**35, "free_bytes": 0}, 5, "leave most of a pass"),
    ],
)
def test_how_many_at_a_time(tokens: list[int], changes: dict[str, Any], together: int, why: str) -> None:
    choice = worth_stacking(tokens, **{**CPU, **changes})
    assert choice.together == together and why in choice.why
