"""Products in 8 bits: where they are possible, what they change, and the gate in front of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graftlm.core.errors import ConfigError, TrainingError
from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.kernels import fp8_products as kernels
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing import fp8
from graftlm.models.fusing.fp8 import fp8_products
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.sft import SftObjective
from graftlm.quant.convert import quantise, quantised_layers
from graftlm.quant.scheme import Scheme
from graftlm.testing.models import tiny
from graftlm.verbs import fp8_check
from graftlm.verbs.fp8_check import check_fp8

CPU = kernels.why_not(torch.device("cpu"))
needs_fp8 = pytest.mark.skipif(CPU is not None, reason=f"this torch does not multiply in FP8: {CPU}")


def model_in_fp8() -> Any:
    model = tiny("llama")
    quantise(model, Scheme("fp8"))
    attach(model, LoraConfig(r=4, init_lora_weights=False), storage=FOLDER)
    return model


def batches() -> Batches:
    ids = tuple(n % 30 for n in range(20))
    rows = [Encoded(ids[:n], (-100, *ids[1:n]), n, False) for n in (8, 14, 20)]
    return Batches(rows, rows_per_batch=2, max_length=32, packing=True, seed=0, pad_token_id=0)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: item for name, item in model.named_parameters() if item.requires_grad}


@needs_fp8
def test_layers_multiply_in_8_bits_for_the_time_of_a_training() -> None:
    model = model_in_fp8()
    found = fp8_products(model)
    layers = quantised_layers(model)
    assert found.summary == f"{len(found.layers)} of {len(layers)} layers in FP8 multiply in 8 bits"
    assert 0 < len(found.layers) <= len(layers)
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with found.in_use():
            assert all(layer.kind == kernels.FP8_PRODUCTS for layer in found.layers)
            in_8 = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain)
    change = (in_8 - plain).norm() / plain.norm()
    assert 0 < change < 0.1


@needs_fp8
def test_the_gate_measures_loss_and_gradients_and_changes_nothing() -> None:
    model = model_in_fp8().train()
    part, objective, parameters = fp8_products(model), SftObjective(model), trained(model)
    state = torch.get_rng_state()
    with fused(fusable(model)):
        found = check_fp8(model, objective, batches().batch(0, 0), parameters, part)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in parameters.values())
    assert 0 <= found.change < 0.01 and 0.95 < found.cosine <= 1.0001
    assert found.loss != found.loss_in_16_bits


@needs_fp8
def test_a_base_that_loses_too_much_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in_fp8().train()
    monkeypatch.setattr(fp8_check, "LEAST_COSINE", 1.1)
    with pytest.raises(TrainingError, match="In FP8 the loss of the first batch"):
        check_fp8(model, SftObjective(model), batches().batch(0, 0), trained(model), fp8_products(model))


def test_a_device_or_a_model_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "why_not", lambda device: "no such units")
    with pytest.raises(ConfigError, match="no such units"):
        fp8_products(tiny("llama"))
    monkeypatch.setattr(fp8, "why_not", lambda device: None)
    with pytest.raises(ConfigError, match="None of the 0 layers"):
        fp8_products(tiny("llama"))
