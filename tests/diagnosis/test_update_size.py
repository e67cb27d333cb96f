from __future__ import annotations

import pytest
import torch
from torch import nn

from graftlm.api import attach
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.lora import LoraConfig
from graftlm.models.load import load_model
from graftlm.quant.weights import WeightHandle
from graftlm.verbs.diagnosing.update_size import SAMPLED, UpdateSize


def _measure(config: LoraConfig, quantization: str = "none") -> tuple[UpdateSize, nn.Module, AdapterSet]:
    torch.manual_seed(0)
    model, _ = load_model("sprout", quantization=quantization)
    adapters = attach(model, config, "default")
    return (
        UpdateSize({"": (model, adapters, "default")}, adapters.named_parameters("default")),
        model,
        adapters,
    )


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_sizes_are_those_of_the_dense_change(quantization: str, use_dora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",), use_dora=use_dora)
    sizes, model, adapters = _measure(config, quantization)
    assert sizes.measure()["moved"] == 0.0 and sizes.measure()["largest"] == 0.0
    expected = {}
    for path, part in adapters.parts("default").items():
        lora = part.lora if use_dora else part
        with torch.no_grad():
            lora.lora_B.normal_()
        weight = WeightHandle(model.get_submodule(path).base_layer).weight().double()
        change = 2.0 * lora.lora_B.detach().double() @ lora.lora_A.detach().double()
        expected[path] = float(change.norm() / weight.norm())
    found = sizes.measure()
    assert found["largest"] == pytest.approx(max(expected.values()), rel=1e-4)
    assert expected[found["largest_at"]] == max(expected.values())
    assert found["moved"] == 1.0 and found["still"] == []


def test_only_what_began_at_zero_tells_whether_it_moved() -> None:
    sizes, _, adapters = _measure(LoraConfig(r=4, target_modules="all-linear"))
    parts = list(adapters.parts("default").items())
    with torch.no_grad():
        for _, part in parts[1:]:
            part.lora_B += 1e-12  # far below what changes a norm in float32
    found = sizes.measure()
    assert found["moved"] == pytest.approx(1 - 1 / len(parts))
    assert found["still"] == [f"{parts[0][0]}.lora_B"]


def test_a_large_model_is_sampled() -> None:
    sizes, _, adapters = _measure(LoraConfig(r=2, target_modules="all-linear"))
    assert len(sizes.sampled) <= SAMPLED < len(adapters.parts("default"))
    assert {path.rpartition(".")[2] for path in sizes.sampled} > {"q_proj", "down_proj"}
