"""Merging on a quantised base: dense beside packed, and the packed bytes are never touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.core.errors import MergeError
from graftlm.core.notices import forget_notices, notices_to
from graftlm.formats.fingerprint import identify, scheme_of
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import adapters_of
from graftlm.methods.base import MethodConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.requantise import requantised
from graftlm.quant.convert import dequantise, is_quantised, quantise, quantised_layers
from graftlm.quant.embedding import quantise_embeddings
from graftlm.quant.packed import encode
from graftlm.quant.scheme import KINDS, Scheme

from .tiny import batch, graft, logits, stir, tiny

METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8),
    "biases": LoraConfig(r=2, bias="all"),
    "dora": LoraConfig(r=4, use_dora=True),
    "ia3": IA3Config(),
    "embeddings": LoraConfig(r=2, target_modules=("embed_tokens", "q_proj")),
}


def packed(kind: str = "nf4", model: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    base = tiny(model).to(dtype)
    quantise(base, Scheme(kind))
    return base


def bytes_of(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for layer in quantised_layers(model).values() for tensor in layer.packed.stored]


def adapted(model: Any, config: MethodConfig | None = None, seed: int = 0) -> AdapterSet:
    adapters = graft(model, config)
    stir(adapters, seed=seed)
    return adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_merged_outputs_are_the_unmerged_ones_and_everything_comes_back(kind: str, model: str) -> None:
    base, inputs = packed(kind, model), batch(model)
    plain, stored = logits(base, inputs), bytes_of(base)
    adapters = adapted(base)
    expected = logits(base, inputs)
    adapters.merge()
    torch.testing.assert_close(logits(base, inputs), expected, rtol=1e-4, atol=2e-5)
    adapters.unmerge()
    assert torch.equal(logits(base, inputs), expected)
    adapters.detach()
    assert torch.equal(logits(base, inputs), plain)
    assert all(map(torch.equal, bytes_of(base), stored))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_every_method_merges_into_a_plain_dense_model(method: str, model: str, tmp_path: Path) -> None:
    config = METHODS[method]
    if method == "embeddings" and model == "gpt2":
        config = LoraConfig(r=2, target_modules=("c_attn", "wpe"))
    base, inputs = packed("nf4", model), batch(model)
    adapters = adapted(base, config)
    expected = logits(base, inputs)
    plain: Any = adapters.merge_and_unload()
    assert adapters_of(plain) is None and not is_quantised(plain)
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-4, atol=2e-5)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-4, atol=2e-5)
    kinds = {type(m) for path, m in tiny(model).named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear | Conv1D)} == kinds


def test_a_merged_weight_is_the_decoded_one_plus_the_change_rounded_once() -> None:
    base = packed(dtype=torch.bfloat16)
    decoded = base.model.layers[0].mlp.up_proj.packed.decode(torch.float32)
    adapters = adapted(base, LoraConfig(r=2, lora_alpha=4, target_modules=("up_proj",)))
    own = adapters.named_parameters("default")
    adapters.merge()
    exact = decoded + 2 * own["model.layers.0.mlp.up_proj.lora_B"] @ own["model.layers.0.mlp.up_proj.lora_A"]
    layer = base.model.layers[0].mlp.up_proj.base_layer
    assert torch.equal(layer.dense, exact.to(torch.bfloat16))


@pytest.mark.parametrize("cycles", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_cycles_with_a_changing_adapter_leave_the_base_its_bytes(cycles: int) -> None:
    base = packed(dtype=torch.bfloat16)
    stored = bytes_of(base)
    adapters = graft(base, LoraConfig(r=2, target_modules=("q_proj", "down_proj")))
    for cycle in range(cycles):
        stir(adapters, seed=cycle)
        adapters.merge()
        adapters.unmerge()
    assert all(map(torch.equal, bytes_of(base), stored))
    assert not any("dense" in name for name, _ in base.named_parameters())


def test_an_active_adapter_keeps_working_beside_a_merged_one() -> None:
    base, inputs = packed(), batch("llama")
    plain = logits(base, inputs)
    adapters = adapted(base, LoraConfig(r=2))
    for name, config in (("dora", LoraConfig(r=2, use_dora=True)), ("ia3", IA3Config())):
        adapters.add(name, config)
        stir(adapters, name)
    adapters.activate(["default", "dora", "ia3"])
    expected = logits(base, inputs)
    for merged in (["default"], ["default", "dora"], ["default", "dora", "ia3"]):
        adapters.merge([name for name in merged if name not in adapters.merged])
        torch.testing.assert_close(logits(base, inputs), expected, rtol=2e-4, atol=1e-4)
    adapters.unmerge()
    assert torch.equal(logits(base, inputs), expected)
    adapters.activate([])
    assert torch.equal(logits(base, inputs), plain)


def test_an_adapter_added_while_another_is_merged_starts_from_the_base_itself() -> None:
    base = packed()
    adapters = adapted(base, LoraConfig(r=2))
    adapters.merge()
    adapters.add("dora", LoraConfig(r=2, use_dora=True, target_modules=("q_proj",)))
    found = adapters.named_parameters("dora")["model.layers.0.self_attn.q_proj.magnitude"]
    alone = graft(packed(), LoraConfig(r=2, use_dora=True, target_modules=("q_proj",)))
    expected = alone.named_parameters("default")["model.layers.0.self_attn.q_proj.magnitude"]
    torch.testing.assert_close(found, expected)


def test_a_merge_says_what_it_costs() -> None:
    heard: list[str] = []
    forget_notices()
    base = packed(dtype=torch.bfloat16)
    adapters = adapted(base, LoraConfig(r=2, target_modules=("q_proj",)))
    with notices_to(heard.append):
        adapters.merge()
    size = sum(2 * layer.in_features * layer.out_features
               for path, layer in quantised_layers(base).items() if "q_proj" in path)  # fmt: skip
    assert len(heard) == 1 and f"{size / 1e6:,.1f} MB more" in heard[0] and "bfloat16" in heard[0]


def test_a_merge_that_overflows_in_float16_is_refused_whole() -> None:
    base = packed(dtype=torch.float16)
    stored = bytes_of(base)
    adapters = graft(base, LoraConfig(r=1, lora_alpha=1, target_modules=("q_proj",)))
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.fill_(300.0)
    with pytest.raises(MergeError, match=r"(?s)q_proj.*bfloat16"):
        adapters.merge()
    assert adapters.merged == () and all(map(torch.equal, bytes_of(base), stored))
    assert not any("dense" in name for name, _ in base.named_parameters())


def test_unmerging_after_the_model_moved() -> None:
    base, inputs = packed(), batch("llama")
    adapters = adapted(base)
    adapters.merge()
    base.to(torch.bfloat16).to(torch.float32)
    adapters.unmerge()
    never_merged = packed()
    adapted(never_merged)
    never_merged.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(logits(base, inputs), logits(never_merged, inputs))
    assert all(map(torch.equal, bytes_of(base), bytes_of(packed())))


# Which base an adapter belongs to, whatever it is stored in.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_base_is_recognised_however_it_is_stored(kind: str, model: str) -> None:
    dense, found = identify(tiny(model)), identify(packed(kind, model))
    assert found.scheme == Scheme(kind) and dense.scheme is None
    assert found.is_close(dense) and dense.is_close(found) and not found.is_same(dense)


def test_another_base_is_told_apart_through_quantisation() -> None:
    other = tiny("llama")
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    quantise(other, Scheme("nf4"))
    assert not identify(other).is_close(identify(tiny("llama")))


def test_an_adapter_trained_on_nf4_loads_on_a_dense_base_and_says_so(tmp_path: Path) -> None:
    adapters = adapted(packed())
    adapters.merge()
    adapters.save(tmp_path / "a")
    forget_notices()
    dense, heard = tiny("llama"), list[str]()
    own = graft(dense, LoraConfig(r=2))
    with notices_to(heard.append):
        own.load(tmp_path / "a", "loaded")
    assert len(heard) == 1 and "nf4" in heard[0] and "works" in heard[0]
    heard.clear()
    again = graft(packed(), LoraConfig(r=2))
    with notices_to(heard.append):
        again.load(tmp_path / "a", "loaded")
    assert not heard
    for name, parameter in adapters.named_parameters("default").items():
        assert torch.equal(parameter, again.named_parameters("loaded")[name])


@pytest.mark.parametrize("model", ["llama", "llama-tied", "gpt2"])
def test_embeddings_in_8_bits_become_dense_and_tied_again_and_are_recognised(model: str) -> None:
    base, inputs = packed("nf4", model), batch(model)
    quantise_embeddings(base, "int8")
    assert scheme_of(base) == Scheme("nf4") and identify(base).is_close(identify(tiny(model)))
    adapters = adapted(base, LoraConfig(r=2))
    expected = logits(base, inputs)
    plain: Any = adapters.merge_and_unload()
    table, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    assert type(table) is nn.Embedding and type(head) is nn.Linear
    assert (table.weight is head.weight) == (model != "llama")
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-4, atol=2e-5)


# In few bits again: a step of its own.


@pytest.mark.parametrize("stored", [None, "nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_requantised_merge_holds_what_it_says(stored: str | None, kind: str) -> None:
    base = tiny("llama") if stored is None else packed(stored)
    before = {path: layer.packed.decode() for path, layer in quantised_layers(base).items()}
    before = before or {name: m.weight for name, m in base.named_modules() if name.endswith("up_proj")}
    adapters = adapted(base, LoraConfig(r=4, lora_alpha=4, target_modules=("up_proj",)))
    own = adapters.named_parameters("default")
    found = requantised(adapters, Scheme(kind), at_least=0.0)
    assert adapters_of(base) is None and scheme_of(base) == Scheme(kind)
    layers = quantised_layers(base)
    assert len(layers) == 14 and {layer.scheme.kind for layer in layers.values()} == {kind}
    along = whole = 0.0
    for path in found.layers:
        change = (own[f"{path}.lora_B"] @ own[f"{path}.lora_A"]).detach()
        start = before[path] if stored == kind else encode(before[path], Scheme(kind)).decode()
        along += float(((layers[path].packed.decode() - start) * change).sum())
        whole += float(change.square().sum())
    assert len(found.layers) == 2 and found.kept == pytest.approx(along / whole, rel=1e-4)
    assert torch.isfinite(logits(base, batch("llama"))).all()


def test_layers_without_an_adapter_keep_their_packed_bytes() -> None:
    base = packed()
    layers = quantised_layers(base)
    untouched = {path: bytes_of(layer) for path, layer in layers.items() if "up_proj" not in path}
    requantised(adapted(base, LoraConfig(r=4, target_modules=("up_proj",))), Scheme("nf4"), at_least=0.0)
    assert len(untouched) == 12
    for path, stored in untouched.items():
        assert all(map(torch.equal, bytes_of(base.get_submodule(path)), stored))


def test_a_small_change_is_refused_and_nothing_is_touched() -> None:
    base, inputs = packed(), batch("llama")
    adapters = adapted(base)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters("default").items():
            parameter.mul_(1e-3 if name.endswith("lora_B") else 1)
    stored, expected = bytes_of(base), logits(base, inputs)
    with pytest.raises(MergeError, match=r"nf4 keeps -?\d.*% of the adapter's change") as refused:
        requantised(adapters, Scheme("nf4"))
    assert len(refused.value.problems) == 5 and "unmerged" in refused.value.fix
    assert torch.equal(logits(base, inputs), expected) and all(map(torch.equal, bytes_of(base), stored))
    assert adapters.active == ("default",) and adapters_of(base) is adapters
    forced = requantised(adapters, Scheme("nf4"), at_least=float("-inf"))
    assert forced.kept < 0.5 and forced.error > 0.5 and forced.size < 0.05


def test_biases_and_embeddings_of_a_requantised_merge_are_dense_and_exact() -> None:
    base, inputs = packed("int8", "gpt2"), batch("gpt2")
    adapters = adapted(base, LoraConfig(r=4, bias="all", target_modules=("c_attn", "wpe")))
    expected, plain = logits(base, inputs), copy.deepcopy(base)
    requantised(adapters, Scheme("int8"))
    exact: Any = adapters_of(plain)
    merged = exact.merge_and_unload()
    assert torch.equal(base.transformer.wpe.weight, merged.transformer.wpe.weight)
    for path, layer in quantised_layers(base).items():
        assert torch.equal(layer.bias, merged.get_submodule(path).bias)
    assert (logits(base, inputs) - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_dequantised_model_has_forgotten_what_it_was() -> None:
    base = packed("nf4", "gpt2", torch.bfloat16)
    base.config.quantization_config = {"quant_method": "bitsandbytes"}
    layers = {path: layer.packed.decode(torch.bfloat16) for path, layer in quantised_layers(base).items()}
    dequantise(base, torch.bfloat16)
    assert not hasattr(base.config, "quantization_config") and not is_quantised(base)
    for path, weight in layers.items():
        module = base.get_submodule(path)
        assert isinstance(module, Conv1D) and torch.equal(module.weight, weight.t())
