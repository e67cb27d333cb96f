"""Lanes: which tokens are whose, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graftlm.core.errors import AdapterError
from graftlm.core.seeding import seed_everything
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lanes import Lanes, side_by_side
from graftlm.methods.lora import LoraConfig
from graftlm.testing.models import batch, logits, tiny

FLAT = {"a": 7, "b": 3}


def adapted(kind: str = "llama") -> tuple[Any, AdapterSet]:
    """A tiny model with a LoRA and an (IA)^3 that both change something."""
    model = tiny(kind)
    seed_everything(3)
    adapters = attach(model, LoraConfig(r=2, init_lora_weights=False), "a", storage=FOLDER)
    adapters.add("b", IA3Config(init_ia3_weights=False))
    return model, adapters


def test_tokens_of_each_lane_get_their_adapter() -> None:
    model, adapters = adapted()
    x = torch.randn(1, 12, model.config.hidden_size)
    layer = model.get_submodule("model.layers.0.self_attn.v_proj")
    expected = []
    for name in ("a", "b"):
        with adapters.activated(name):
            expected.append(layer(x))
    with adapters.disabled():
        base = layer(x)
    with adapters.stacked(["a", "b"]) as lanes, lanes.over({12: side_by_side(FLAT)}):
        found = layer(x)
    torch.testing.assert_close(found[:, :7], expected[0][:, :7])
    torch.testing.assert_close(found[:, 7:10], expected[1][:, 7:10])
    torch.testing.assert_close(found[:, 10:], base[:, 10:])


def test_outside_of_a_batch_the_model_is_its_base_and_afterwards_as_before() -> None:
    model, adapters = adapted()
    inputs = batch("llama")
    before = logits(model, inputs)
    with adapters.disabled():
        base = logits(model, inputs)
    with adapters.stacked(["a", "b"]) as lanes:
        torch.testing.assert_close(logits(model, inputs), base)
        with lanes.paused():
            torch.testing.assert_close(logits(model, inputs), before)
        with pytest.raises(AdapterError, match="routed"):
            adapters.delete("b")
    torch.testing.assert_close(logits(model, inputs), before)


def test_rows_of_a_padded_batch_may_be_lanes() -> None:
    model, adapters = adapted()
    inputs = batch("llama", rows=3)
    each = {}
    for name in ("a", "b"):
        with adapters.activated(name):
            each[name] = logits(model, inputs)
    width = inputs["input_ids"].shape[1]
    lanes_of = side_by_side({"a": width, "b": 2 * width})
    with adapters.stacked(["a", "b"]) as lanes, lanes.over({3 * width: lanes_of}):
        found = logits(model, inputs)
    torch.testing.assert_close(found[:1], each["a"][:1])
    torch.testing.assert_close(found[1:], each["b"][1:])


def test_what_cannot_share_a_batch_is_refused() -> None:
    model, adapters = adapted()
    layer = model.get_submodule("model.layers.0.self_attn.v_proj")
    with adapters.stacked(["a", "b"]) as lanes, lanes.over({12: side_by_side(FLAT)}):
        with pytest.raises(AdapterError, match="another order"):
            layer(torch.randn(5, model.config.hidden_size))
        with pytest.raises(AdapterError, match="routed"):
            adapters.stacked(["a"])
    adapters.merge("a")
    with pytest.raises(AdapterError, match="are merged"), adapters.stacked(["a", "b"]):
        pass


def test_random_numbers_of_a_lane_are_those_of_a_run_alone() -> None:
    lanes = Lanes({"a": torch.Generator().manual_seed(5), "b": torch.Generator().manual_seed(6)})
    torch.manual_seed(5)
    expected = [torch.randint(2**62, ()), torch.rand(3), torch.randint(2**62, ())]
    torch.manual_seed(1)
    outside = torch.get_rng_state()
    with lanes.over({}):
        first = lanes.new_seed("a", 1)
        lanes.new_seed("b", 1)
        with lanes.drawing("a", 2):
            second = torch.rand(3)
        third = lanes.new_seed("a", 3)
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert torch.equal(third, expected[2]) and torch.equal(outside, torch.get_rng_state())
    state = lanes.generators["a"].get_state()
    with lanes.again():
        assert torch.equal(lanes.new_seed("a", 1), first)
        with lanes.drawing("a", 2):
            assert torch.equal(torch.rand(3), second)
    assert torch.equal(lanes.generators["a"].get_state(), state)


def test_a_layer_that_is_called_twice_is_not_repeated_at_random() -> None:
    lanes = Lanes({"a": torch.Generator()})
    with lanes.over({}):
        lanes.new_seed("a", 1), lanes.new_seed("a", 1)
    with lanes.again(), pytest.raises(AdapterError, match="several times"):
        lanes.new_seed("a", 1)


def test_a_layer_with_more_than_its_input_is_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return super().forward(input) * scale

    model = nn.Sequential(Scaled(4, 4))
    adapters = attach(model, LoraConfig(r=2, target_modules=("0",)), "a", storage=FOLDER)
    with adapters.stacked(["a"]) as lanes, lanes.over({3: side_by_side({"a": 3})}):
        model[0](torch.ones(3, 4))
        with pytest.raises(AdapterError, match="more than its input"):
            model[0](torch.ones(3, 4), scale=2.0)
