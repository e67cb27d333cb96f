"""LoRA: what it computes, on every kind of model, and how it starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError, MergeError, TargetError
from graftlm.methods.base import Layer
from graftlm.methods.lora import LoraConfig
from graftlm.methods.low_rank import LoraEmbedding, LoraLinear

from .tiny import KINDS, batch, graft, logits, snapshot, stir, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(kind: str) -> None:
    model, inputs = tiny(kind), batch(kind)
    before = logits(model, inputs)
    adapters = graft(model, LoraConfig(r=4))
    assert torch.equal(logits(model, inputs), before)
    stir(adapters)
    assert not torch.allclose(logits(model, inputs), before, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_output_is_that_of_a_base_with_changed_weights(kind: str, use_rslora: bool) -> None:
    """The definition: W + scale B A, formed in float64 in the test."""
    model, inputs = tiny(kind).double(), batch(kind)
    changed = copy.deepcopy(model)
    adapters = graft(model, LoraConfig(r=4, lora_alpha=6, use_rslora=use_rslora), dtype="base")
    stir(adapters)
    scale = 6 / 4**0.5 if use_rslora else 6 / 4
    for path, part in adapters.parts("default").items():
        assert isinstance(part, LoraLinear)
        delta = (scale * part.lora_B @ part.lora_A).detach()
        layer = changed.get_submodule(path)
        layer.weight.data += delta if isinstance(layer, nn.Linear) else delta.T
    torch.testing.assert_close(logits(model, inputs), logits(changed, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "name", "scale"),
    [
        ("llama", "embed_tokens", 1.0),
        ("gemma3", "embed_tokens", 32**0.5),
        ("bart", "embed_tokens", 32**0.5),
        ("t5", "embed_tokens", 1.0),
        ("gpt2", "wte", 1.0),
        ("roberta", "word_embeddings", 1.0),
    ],
)
def test_an_adapted_embedding_is_an_embedding_with_a_changed_table(
    kind: str, name: str, scale: float
) -> None:
    model, inputs = tiny(kind).double(), batch(kind)
    changed = copy.deepcopy(model)
    adapters = graft(model, LoraConfig(r=3, lora_alpha=6, target_modules=(name,)), dtype="base")
    stir(adapters)
    for path, part in adapters.parts("default").items():
        assert isinstance(part, LoraEmbedding)
        assert part.embed_scale == pytest.approx(scale)
        table = changed.get_submodule(path)
        delta = (2 * (part.lora_embedding_B @ part.lora_embedding_A).T).detach()
        table.weight = nn.Parameter(table.weight.detach() + delta)
    assert not torch.allclose(logits(tiny(kind).double(), inputs), logits(model, inputs), atol=1e-4)
    tolerance = 1e-6 if kind == "gemma3" else 1e-10  # Gemma keeps its factor in float32.
    torch.testing.assert_close(logits(model, inputs), logits(changed, inputs), rtol=0, atol=tolerance)


def test_the_padding_row_of_an_embedding_gets_no_gradient() -> None:
    model = tiny("llama")
    adapters = graft(model, LoraConfig(r=2, target_modules=("embed_tokens",), init_lora_weights=False))
    model(input_ids=torch.tensor([[0, 5, 6]])).logits.square().sum().backward()
    (part,) = adapters.parts("default").values()
    gradient = part.get_parameter("lora_embedding_A").grad
    assert gradient is not None
    assert not gradient[:, 0].any() and gradient[:, 5].any()


def test_initialisation() -> None:
    torch.manual_seed(0)
    layer = Layer("x", nn.Linear(400, 300))
    starts: dict[Any, LoraLinear] = {}
    for init in (True, False, "gaussian"):
        part = LoraConfig(r=8, init_lora_weights=init).build(layer)
        assert isinstance(part, LoraLinear)
        starts[init] = part
    assert not starts[True].lora_B.any() and not starts["gaussian"].lora_B.any()
    assert starts[False].lora_B.any()
    assert starts[True].lora_A.abs().max() <= 1 / 400**0.5
    assert starts["gaussian"].lora_A.std().item() == pytest.approx(1 / 8, rel=0.1)
    part = LoraConfig(r=8).build(Layer("x", nn.Embedding(50, 20)))
    assert isinstance(part, LoraEmbedding)
    assert not part.lora_embedding_A.any()
    assert part.lora_embedding_B.std().item() == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_float32_and_the_output_is_the_bases(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    inputs = batch("llama")
    adapters = graft(model)
    assert {p.dtype for p in adapters.parameters("default")} == {torch.float32}
    assert logits(model, inputs).dtype == dtype
    adapters.add("half", LoraConfig(r=2), dtype="base")
    assert {p.dtype for p in adapters.parameters("half")} == {dtype}


def test_dropout_acts_in_training_only_and_on_the_adapter_only() -> None:
    model, inputs = tiny("llama"), batch("llama")
    base = logits(model, inputs)
    adapters = graft(model, LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False))
    steady = logits(model, inputs)
    assert torch.equal(steady, logits(model, inputs))
    model.train()
    noisy = [logits(model, inputs) for _ in range(2)]
    assert not torch.equal(*noisy)
    with adapters.disabled():
        assert torch.equal(logits(model, inputs), base)
    model.eval()
    assert torch.equal(steady, logits(model, inputs))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_the_adapters_own(bias: str) -> None:
    model, inputs = tiny("bert"), batch("bert")
    unchanged = snapshot(model)
    before = logits(model, inputs)
    adapters = graft(model, LoraConfig(r=2, target_modules=("query",), bias=bias))
    assert torch.equal(logits(model, inputs), before)
    names = [name for name in adapters.named_parameters("default") if name.endswith("bias")]
    with_bias = [name for name, p in model.bert.named_parameters() if name.endswith("base_layer.bias")]
    assert len(names) == (2 if bias == "lora_only" else len(with_bias) + 1)
    stir(adapters)
    stirred = logits(model, inputs)
    assert not torch.equal(stirred, before)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), stirred, rtol=1e-4, atol=1e-5)
    adapters.detach()
    unchanged()


def test_all_biases_are_trained_beside_another_adapter_too() -> None:
    alone, beside = tiny("bert"), tiny("bert")
    config = LoraConfig(r=2, target_modules=("query",), bias="all")
    graft(beside, LoraConfig(r=2, target_modules="all-linear"), "first")
    names = [list(graft(model, config, "b").named_parameters("b")) for model in (alone, beside)]
    assert names[0] == names[1]


def test_a_full_copy_is_trained_and_the_base_is_not() -> None:
    model, inputs = tiny("bert"), batch("bert")
    unchanged = snapshot(model)
    before = logits(model, inputs)
    adapters = graft(model, LoraConfig(r=2, target_modules=("query",), modules_to_save=("classifier",)))
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=0)
    model(**inputs).loss.backward()
    trained = adapters.named_parameters("default")
    assert {"classifier.module.weight", "classifier.module.bias"} <= set(trained)
    assert trained["classifier.module.weight"].grad is not None
    stir(adapters)
    stirred = logits(model, inputs)
    with adapters.disabled():
        assert torch.equal(logits(model, inputs), before)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), stirred, rtol=1e-4, atol=1e-5)
    adapters.detach()
    unchanged()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"r": 0}, "r"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"bias": "some"}, "bias"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights"),
        ({"lora_alpa": 8}, "did you mean 'lora_alpha'"),
        ({"target_modules": ()}, "target_modules"),
        ({"target_modules": ("",)}, "target_modules"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern"),
        ({"alpha_pattern": {"q(": 2}}, "not a valid regular expression"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias cannot be used"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        LoraConfig(**fields)


def test_patterns_give_modules_their_own_rank_and_alpha() -> None:
    """First match in order wins; a pattern is for a path or what comes after one of its dots."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={r"layers\.0\..*proj": 4, "q_proj": 2, "model.layers.1.mlp.up_proj": 3},
        alpha_pattern={"q_proj": 6.0},
    )
    parts = graft(tiny("llama"), config).parts("default")
    seen = {
        path.removeprefix("model.layers."): (part.get_parameter("lora_A").shape[0], part.scaling)
        for path, part in parts.items()
        if isinstance(part, LoraLinear)
    }
    assert seen["0.self_attn.q_proj"] == (4, 1.5) and seen["1.self_attn.q_proj"] == (2, 3.0)
    assert seen["0.mlp.up_proj"] == (4, 4.0) and seen["1.mlp.up_proj"] == (3, pytest.approx(16 / 3))
    assert seen["1.self_attn.k_proj"] == (8, 2.0)
    stable = config.replace(use_rslora=True)
    assert stable.scaling_at("model.layers.1.self_attn.q_proj") == pytest.approx(6 / 2**0.5)
    assert stable.scaling_at("model.layers.1.self_attn.k_proj") == stable.scaling


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_no_target_are_named(field: str) -> None:
    model = tiny("llama")
    unchanged = snapshot(model)
    patterns = {"q_proj": 2, "q_prj": 3, "down_proj": 4, "proj": 5}
    with pytest.raises(TargetError) as caught:
        graft(model, LoraConfig(target_modules=("q_proj",), **{field: patterns}))
    assert len(caught.value.problems) == 3
    for name, problem in zip(("q_prj", "down_proj", "proj"), caught.value.problems, strict=True):
        assert field in problem and repr(name) in problem
    unchanged()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_bias_of_the_update_is_trained_scaled_and_merged(kind: str) -> None:
    model, inputs = tiny(kind).double(), batch(kind)
    changed, before = copy.deepcopy(model), logits(model, inputs)
    adapters = graft(model, LoraConfig(r=2, lora_alpha=6, lora_bias=True), dtype="base")
    assert torch.equal(logits(model, inputs), before)
    stir(adapters)
    for path, part in adapters.parts("default").items():
        assert isinstance(part, LoraLinear) and part.lora_B_bias is not None
        layer = changed.get_submodule(path)
        delta = (3 * part.lora_B @ part.lora_A).detach()
        layer.weight.data += delta if isinstance(layer, nn.Linear) else delta.T
        layer.bias.data += 3 * part.lora_B_bias.detach()
    expected = logits(changed, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-9, atol=1e-10)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-9, atol=1e-10)


def test_a_bias_of_the_update_needs_a_bias_below_to_be_merged() -> None:
    model = tiny("llama")
    adapters = graft(model, LoraConfig(r=2, lora_bias=True))
    unchanged = snapshot(model)
    with pytest.raises(MergeError, match="the base layer has none"):
        adapters.merge()
    unchanged()


def test_a_bias_of_the_update_is_for_linear_layers() -> None:
    with pytest.raises(TargetError, match="embed_tokens"):
        graft(tiny("llama"), LoraConfig(lora_bias=True, target_modules=("embed_tokens", "q_proj")))


def test_a_frozen_model_gets_gradients_in_the_adapter_only() -> None:
    for kind in KINDS:
        model, inputs = tiny(kind).train(), batch(kind)
        adapters = graft(model)
        model(**inputs).loss.backward()
        own = set(map(id, adapters.parameters("default")))
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in own), (kind, name)


def test_gradients_of_the_parts_are_those_of_the_merged_weight() -> None:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, from a model whose weight itself is trained."""
    model, inputs = tiny("llama").double(), batch("llama")
    merged = copy.deepcopy(model)
    adapters = graft(model, LoraConfig(r=3, lora_alpha=6, init_lora_weights=False), dtype="base")
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for path, part in adapters.parts("default").items():
        assert isinstance(part, LoraLinear)
        parts[path] = (part.lora_A, part.lora_B)
        merged.get_submodule(path).weight.data += (2 * part.lora_B @ part.lora_A).detach()
    model(**inputs).loss.backward()
    merged(**inputs).loss.backward()
    for path, (a, b) in parts.items():
        dense = merged.get_submodule(path).weight.grad
        torch.testing.assert_close(a.grad, 2 * b.detach().T @ dense, rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(b.grad, 2 * dense @ a.detach().T, rtol=1e-7, atol=1e-11)


def test_lora_plus_speeds_up_the_output_side_only() -> None:
    """As in PEFT: B and everything of one dimension."""
    for part, names in (
        (LoraLinear(4, 6, r=2, scaling=1.0), ["lora_B"]),
        (LoraLinear(4, 6, r=2, scaling=1.0, lora_bias=True, bias=torch.ones(6)), None),
        (LoraEmbedding(torch.nn.Embedding(5, 4), r=2, scaling=1.0), ["lora_embedding_B"]),
    ):
        found = [key for key, _ in part.named_parameters() if key in part.output_side]
        assert found == (names or ["lora_B", "lora_B_bias", "shift.bias"])
