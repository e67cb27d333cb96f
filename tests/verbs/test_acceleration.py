"""What a recipe asks for to be faster, and what it may not ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graftlm.core.errors import ConfigError
from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.kernels.attention import attention_is_native
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.objectives.recorded import RecordedSft
from graftlm.objectives.sft import SftObjective
from graftlm.quant.convert import quantise
from graftlm.quant.scheme import Scheme
from graftlm.testing.models import tiny
from graftlm.training.recipe import make_recipe
from graftlm.verbs import record_choice
from graftlm.verbs.acceleration import accelerated
from graftlm.verbs.step_setup import StepSetup, step_setup


def setting(*overrides: str, dtype: torch.dtype = torch.bfloat16) -> tuple[StepSetup, Any, Any, Any, int]:
    """The arguments of `accelerated`."""
    recipe = make_recipe({"model": "base", "data": "rows.jsonl"}, overrides)
    model = tiny("llama").to(dtype)
    if recipe.model.quantization != "none":
        quantise(model, Scheme(recipe.model.quantization))
    attach(model, LoraConfig(r=4), storage=FOLDER)
    ids = tuple(n % 30 for n in range(20))
    rows = [Encoded(ids[:n], (-100, *ids[1:n]), n, False) for n in (8, 14, 20)]
    packing = recipe.data.packing
    batches = Batches(rows, rows_per_batch=2, max_length=32, packing=packing, seed=0, pad_token_id=0)
    parameters = {name: item for name, item in model.named_parameters() if item.requires_grad}
    return step_setup(model, SftObjective(model), recipe), recipe, batches, parameters, 10**6


def test_a_short_run_stays_as_it_is() -> None:
    arguments = setting()
    setup, found = accelerated(*arguments)
    assert setup.fusable == arguments[0].fusable and setup.objective.tokens == 0
    assert not found.compile.compiles and found.fp8_products is None


@pytest.mark.skipif(attention_is_native(torch.bfloat16, 8) is not None, reason="no native attention")
def test_compiled_layers_come_last_and_batches_are_filled() -> None:
    arguments = setting("train.compile=on")
    setup, found = accelerated(*arguments)
    assert found.compile.compiles and found.compile.why == "the recipe says so"
    total = len(setup.model.model.layers)  # type: ignore[union-attr, arg-type]
    assert setup.fusable.summary.endswith(f"{total - 1} of {total} layers compiled"), "the last is shortened"
    assert setup.objective.tokens == arguments[2].most_tokens


@pytest.mark.parametrize(
    ("override", "dtype", "why"),
    [
        ("data.packing=false", torch.bfloat16, "not packed"),
        ("data.packing=true", torch.float32, "documents in one row together"),
    ],
)
def test_what_cannot_be_compiled_is_refused(override: str, dtype: torch.dtype, why: str) -> None:
    with pytest.raises(ConfigError, match="not possible here") as error:
        accelerated(*setting("train.compile=on", override, dtype=dtype))
    assert why in str(error.value)
    _, found = accelerated(*setting(override, dtype=dtype))
    assert why in found.compile.why


def test_fp8_products_are_checked_on_the_first_batch() -> None:
    setup, found = accelerated(*setting("model.quantization=fp8", "model.products=fp8"))
    assert "multiply in 8 bits" in setup.fusable.summary
    assert found.fp8_products is not None and found.fp8_products.change < 0.01


def test_products_belong_to_a_base_in_fp8() -> None:
    with pytest.raises(ConfigError, match="products: fp8 multiplies a base that is stored in fp8"):
        make_recipe({"model": "base", "data": "rows.jsonl"}, ["model.products=fp8"])


def test_steps_are_recorded_on_cuda_only() -> None:
    with pytest.raises(ConfigError, match="not possible") as refused:
        accelerated(*setting("train.recorded_steps=on", "method.lora_dropout=0.1"))
    problems = " ".join(refused.value.problems)
    assert "the device is cpu" in problems and "dropout" in problems, "all reasons at once"
    setup, found = accelerated(*setting())
    assert not found.recorded.records and "the device is cpu" in found.recorded.why
    assert type(setup.objective) is SftObjective


@pytest.mark.skipif(attention_is_native(torch.bfloat16, 8) is not None, reason="no native attention")
def test_where_nothing_stands_against_it_the_recipe_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_choice, "device_of", lambda model: torch.device("cuda"))
    assert accelerated(*setting())[1].recorded.why == "its gain was not measured on this device"
    setup, found = accelerated(*setting("train.recorded_steps=on"))
    assert found.recorded.records and isinstance(setup.objective, RecordedSft)
    assert accelerated(*setting("train.recorded_steps=off"))[1].recorded.why == "the recipe says so"
