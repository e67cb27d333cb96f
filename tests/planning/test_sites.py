"""What a method adds, in figures: against the adapter that is really attached."""

from __future__ import annotations

from dataclasses import fields

import pytest

import graftlm as gl
from graftlm.core.errors import TargetError
from graftlm.planning.base_facts import base_facts
from graftlm.planning.sites import Sites, sites_of
from graftlm.training.method_section import Method

METHODS = ("lora", "dora", "ia3", "bottleneck", "prefix", "prompt", "adaption_prompt", "full", "norms")


def _sites(method: object, base: str = "sprout") -> Sites:
    return sites_of(base_facts(base), Method.parse(method).config)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_what_an_adapter_has(method: str) -> None:
    model, _ = gl.load_model("sprout")
    config = Method.parse(method).config
    adapters = gl.attach(model, config)
    sites = _sites(method)
    assert sites.trainable == adapters.count_parameters()[0]
    assert sites.tensors == len(adapters.named_parameters("default"))
    assert sites.places == len(adapters.parts("default"))


def test_thin_matrices_are_products_and_vectors_are_not() -> None:
    lora, dora, ia3 = _sites("lora"), _sites("dora"), _sites("ia3")
    assert lora.products == lora.trainable
    assert dora.products == lora.products
    assert dora.scaled == dora.trainable - lora.trainable
    assert dora.normed > 0 == lora.normed
    assert (ia3.products, ia3.scaled) == (0, ia3.trainable)
    assert _sites({"type": "lora", "r": 32}).products == 2 * lora.products
    assert _sites({"type": "lora", "r": 32}).narrow == lora.narrow, (
        "the wide side does not grow with the rank"
    )


def test_published_counts_come_out() -> None:
    assert _sites({"type": "lora", "r": 16}, "meta-llama/Llama-3.1-8B").trainable == 41_943_040
    attention = {"type": "lora", "r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    assert _sites(attention, "meta-llama/Llama-3.1-8B").trainable == 13_631_488


def test_virtual_tokens_and_keys() -> None:
    prompt, prefix = _sites({"type": "prompt", "num_virtual_tokens": 7}), _sites("prefix")
    assert (prompt.input_tokens, prompt.added_keys) == (7, 0)
    assert (prefix.input_tokens, prefix.added_keys) == (0, 20 * 4), "20 keys before each of 4 layers"


def test_gradients_stop_below_the_lowest_adapter() -> None:
    assert _sites("lora").backward_share == 1.0
    top = {"type": "lora", "layers_to_transform": [3]}
    assert _sites(top).backward_share == 0.25
    assert _sites("prompt").backward_share == 1.0
    assert _sites("full").backward_share == 1.0


def test_a_copy_of_the_whole_base() -> None:
    facts, full = base_facts("sprout"), _sites("full")
    assert full.trainable == facts.total
    assert full.copied >= sum(shape.parameters for shape in facts.linears if shape.in_block)


def test_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _sites({"type": "lora", "r": 5})
    monkeypatch.setattr("graftlm.planning.sites.resolve", None)
    assert _sites({"type": "lora", "r": 5}) is first
    with pytest.raises(TypeError):
        _sites({"type": "lora", "r": 6})


def test_a_method_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TargetError, match="no biases"):
        _sites("biases")


def test_every_figure_is_a_count() -> None:
    for method in METHODS:
        sites = _sites(method)
        assert all(getattr(sites, each.name) >= 0 for each in fields(sites))
        assert 0 < sites.backward_share <= 1
