"""Which layers are quantised, and that quantising and its inverse change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from graftlm.core.errors import ModelError
from graftlm.quant.convert import (
    dense_weight,
    dequantise,
    is_quantised,
    matches,
    quantisable,
    quantise,
    quantised_layers,
    require_dense,
)
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme
from graftlm.testing.models import KINDS

MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16, "intermediate_size": 48},
    ),
    "bert, no head": ("BertModel", "BertConfig", KINDS["bert"][2]),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 48,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
}
ALL = {**KINDS, **MORE}


def a_model(kind: str) -> Any:
    model_name, config_name, settings = ALL[kind]
    torch.manual_seed(0)
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**settings)).eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, **more}


def first_output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs_of(model))[0]
    assert isinstance(out, torch.Tensor)
    return out


def chosen_by_transformers(model: Any) -> set[str]:
    """What its bitsandbytes path replaces."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        path
        for path, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, kept)
    }


OTHERWISE = {
    # It forgets that the last parameter may be a bias, and knows a head by its last layer only.
    "bert": ({"classifier"}, set()),
    "bert, no head": ({"pooler.dense"}, set()),
    "roberta": ({"classifier.dense", "classifier.out_proj"}, set()),
    "qwen2-moe": ({f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)}, set()),
    "falcon": (
        set(),
        {
            f"transformer.h.{i}.{name}"
            for i in (0, 1)
            for name in (
                *("self_attention.query_key_value", "self_attention.dense"),
                *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            )
        },
    ),
}
"""Where we differ, and how: (not quantised here, not quantised there)."""


@pytest.mark.parametrize("kind", ALL)
def test_the_layers_are_those_that_transformers_quantises(kind: str) -> None:
    model = a_model(kind)
    ours, theirs = set(quantisable(model)), chosen_by_transformers(model)
    kept, added = OTHERWISE.get(kind, (set(), set()))
    assert theirs - ours == kept and ours - theirs == added
    assert len(ours) >= 4 and not any("lm_head" in path or "score" in path for path in ours)


@pytest.mark.parametrize("kind", ALL)
def test_the_layers_of_a_model_without_weights_are_the_same(kind: str) -> None:
    model_name, config_name, settings = ALL[kind]
    with torch.device("meta"):
        hollow = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings))
    assert list(quantisable(hollow)) == list(quantisable(a_model(kind)))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_only_the_weights_of_those_layers_change(kind: str, scheme: str) -> None:
    model = a_model(kind)
    layers = quantisable(model)
    weights = {path: dense_weight(module).clone() for path, module in layers.items()}
    others = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers}
    biases = {path: module.bias for path, module in layers.items()}
    assert not is_quantised(model)
    require_dense(model)

    paths = quantise(model, Scheme(scheme))
    assert paths == list(layers) == list(quantised_layers(model)) and is_quantised(model)
    assert dict(model.named_parameters()) == others  # the very objects
    for path, layer in quantised_layers(model).items():
        expected = encode(weights[path], Scheme(scheme))
        assert layer.bias is biases[path] and not layer.training
        assert (layer.out_features, layer.in_features) == tuple(weights[path].shape)
        assert all(torch.equal(layer.packed.tensors[n], t) for n, t in expected.tensors.items())
        assert layer.weight.dtype == torch.float32

    quantised = first_output(model)
    dequantise(model, torch.float32)
    assert not is_quantised(model) and {type(m) for m in layers.values()} == {
        type(model.get_submodule(path)) if kind != "falcon" else type(layers[path]) for path in paths
    }
    torch.testing.assert_close(first_output(model), quantised, rtol=1e-4, atol=1e-4)
    for path in paths:
        decoded = encode(weights[path], Scheme(scheme)).decode()
        assert torch.equal(dense_weight(model.get_submodule(path)), decoded)


def test_a_16_bit_model_stands_for_16_bits() -> None:
    model = a_model("llama").to(torch.bfloat16)
    quantise(model, Scheme("nf4"))
    assert {layer.dtype for layer in quantised_layers(model).values()} == {torch.bfloat16}
    assert first_output(model).dtype == torch.bfloat16


def test_layers_may_be_skipped_by_name_path_or_part_of_it() -> None:
    everything = list(quantisable(a_model("llama")))
    one = "model.layers.0.mlp.up_proj"
    cases: dict[str, list[str]] = {
        "mlp": [path for path in everything if ".mlp." in path],
        "layers.1": [path for path in everything if ".layers.1." in path],
        "q_proj": [path for path in everything if path.endswith("q_proj")],
        one: [one],
        "proj": [],
        "layers": everything,
    }
    for pattern, skipped in cases.items():
        left = list(quantisable(a_model("llama"), skip=[pattern]))
        assert left == [path for path in everything if path not in skipped], pattern
    model = a_model("llama")
    assert quantise(model, Scheme("nf4"), skip=["mlp", "q_proj"]) == list(quantised_layers(model))
    assert type(model.get_submodule(one)) is nn.Linear


def test_patterns_are_whole_names() -> None:
    assert matches("model.layers.1.fc1", "fc1") and matches("model.layers.1.fc1", "layers.1")
    assert not matches("model.layers.11.fc1", "layers.1") and not matches("model.fc11", "fc1")


def test_tied_layers_stay_as_they_are() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    assert list(quantisable(model)) == ["c"]


def test_the_projection_that_torch_attention_reads_itself_stays() -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    assert quantise(model, Scheme("int8")) == ["linear1", "linear2"]


def test_quantising_twice_is_refused() -> None:
    model = a_model("llama")
    quantise(model, Scheme("nf4"))
    before = {path: layer.packed.tensors["codes"].clone() for path, layer in quantised_layers(model).items()}
    with pytest.raises(ModelError, match=r"already \(model\.layers\.0\.self_attn\.q_proj is stored as nf4\)"):
        quantise(model, Scheme("int8"))
    assert all(torch.equal(layer.codes, before[path]) for path, layer in quantised_layers(model).items())


def test_a_model_that_another_library_quantised_is_refused() -> None:
    modules = pytest.importorskip("bitsandbytes.nn")
    model = a_model("llama")
    theirs = modules.Linear4bit(32, 32, bias=False).to("cpu")
    model.model.layers[1].self_attn.q_proj = theirs
    with pytest.raises(ModelError, match="Linear4bit of bitsandbytes"):
        quantise(model, Scheme("nf4"))
    model = a_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match="names a quantization_config"):
        quantise(model, Scheme("nf4"))


@pytest.mark.parametrize("scheme", ["nf4", "int8", "fp8"])
def test_a_weight_that_is_not_finite_is_named_and_the_rest_is_untouched(scheme: str) -> None:
    model = a_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[3, 5] = torch.nan
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn\.weight holds 1 values"):
        quantise(model, Scheme(scheme))
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "t5"])
@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_a_quantised_model_is_saved_and_its_state_loaded(kind: str, scheme: str, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model, other = a_model(kind), a_model(kind)
    quantise(model, Scheme(scheme))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    quantise(other, Scheme("int8"))
    stored = load_file(tmp_path / "model.safetensors")
    missing = other.load_state_dict(stored, strict=False)
    assert not missing.unexpected_keys
    other.tie_weights()
    assert torch.equal(first_output(other), first_output(model))
