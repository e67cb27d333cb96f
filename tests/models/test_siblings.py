"""Models over the same weights: no weight twice, heads as when loaded alone, nothing in common else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.core.errors import ModelError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.ending import TEXT, Ending
from graftlm.models.load import load_model
from graftlm.models.siblings import sibling

THREE = Ending("rows", ("a", "b", "c"), seed=5)
FIVE = Ending("rows", ("1", "2", "3", "4", "5"), seed=5)
TAGS = Ending("tokens", ("o", "x"), seed=5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 17).unsqueeze(0)).logits
    return found


def storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def sprout(ending: Ending = TEXT, **how: Any) -> Any:
    return load_model("sprout", dtype="float32", ending=ending, **how)[0]


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_the_same_ending(quantization: str | None) -> None:
    model = sprout(quantization=quantization)
    other = sibling(model, TEXT, TEXT)
    assert storages(other) == storages(model)
    assert torch.equal(logits(other), logits(model))
    assert not {id(module) for module in other.modules()} & {id(module) for module in model.modules()}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(("own", "wanted"), [(TEXT, THREE), (TEXT, TAGS), (THREE, FIVE), (THREE, TAGS)])
def test_another_ending_is_as_if_loaded_with_it(
    own: Ending, wanted: Ending, quantization: str | None
) -> None:
    model = sprout(own, quantization=quantization)
    other = sibling(model, own, wanted)
    alone = sprout(wanted, quantization=quantization)
    assert type(other) is type(alone)
    assert torch.equal(logits(other), logits(alone))
    assert storages(other.base_model) == storages(model.base_model)
    assert other.config.id2label == alone.config.id2label


def test_encoder(shared: Path) -> None:
    base = shared / "models" / "roberta-tiny-en"
    model = load_model(base, dtype="float32", ending=THREE)[0]
    for wanted in (FIVE, TAGS):
        alone = load_model(base, dtype="float32", ending=wanted)[0]
        assert torch.equal(logits(sibling(model, THREE, wanted)), logits(alone))


def test_an_adapter_on_one_is_not_on_the_other() -> None:
    model = sprout()
    other = sibling(model, TEXT, TEXT)
    before = logits(other)
    adapters = attach(model, LoraConfig(r=2, init_lora_weights=False), storage=FOLDER)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(other), before)
    attach(other, LoraConfig(r=4), storage=FOLDER)
    adapters.detach()
    assert torch.equal(logits(model), before)


def test_streamed_layers_are_refused() -> None:
    model = load_model("sprout", placement="disk")[0]
    with pytest.raises(ModelError, match="come from disk one by one"):
        sibling(model, TEXT, TEXT)
