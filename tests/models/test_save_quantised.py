from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.core.errors import ModelError, UsageError
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.load import load_model
from graftlm.models.save_quantised import save_base
from graftlm.quant.convert import quantised_layers
from graftlm.quant.weights import WeightHandle
from graftlm.testing.models import batch, logits

from .bases import CAUSAL_AND_SEQUENCE, OTHERS, checkpoint

SCHEMES = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("fp8", True), ("fp8_block", True)]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ids(kind: str) -> dict[str, Tensor]:
    return batch("llama" if kind in OTHERS else kind)


@pytest.mark.parametrize(("kind", "double"), SCHEMES)
def test_what_is_saved_loads_as_the_same_bytes(kind: str, double: bool, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "dense", "llama")
    model, tokenizer = load_model(folder, quantization=kind, double_quant=double, dtype="bfloat16")
    before = logits(model, ids("llama"))
    save_base(model, tokenizer, tmp_path / "once", max_shard_size="40KB")
    again, tokenizer = load_model(tmp_path / "once", dtype="bfloat16")
    assert torch.equal(logits(again, ids("llama")), before)
    schemes = [{layer.scheme for layer in quantised_layers(each).values()} for each in (model, again)]
    assert schemes[0] == schemes[1]
    save_base(again, tokenizer, tmp_path / "twice", max_shard_size="40KB")
    assert files(tmp_path / "once") == files(tmp_path / "twice")
    assert len(list((tmp_path / "once").glob("*.safetensors"))) > 1
    assert not hasattr(model.config, "quantization_config"), "only the file says it"


@pytest.mark.parametrize("kind", [kind for kind in CAUSAL_AND_SEQUENCE if kind != "llama"])
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(checkpoint(tmp_path / "dense", kind), quantization="nf4", dtype="float32")
    save_base(model, tokenizer, tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved", dtype="float32")
    assert torch.equal(logits(again, ids(kind)), logits(model, ids(kind)))
    assert quantised_layers(again).keys() == quantised_layers(model).keys()


def test_names_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "dense", "mixtral")
    save_base(*load_model(folder, quantization="nf4", dtype="float32"), tmp_path / "saved")
    original, saved = stored(folder), stored(tmp_path / "saved")
    assert {name for name in saved if ".weight." not in name} == original.keys()
    experts = [name for name in saved if "experts" in name]
    assert experts and all(torch.equal(saved[name], original[name]) for name in experts)


def test_4_bits_on_disk(tmp_path: Path) -> None:
    model, tokenizer = load_model("sprout", quantization="nf4", dtype="bfloat16", device="cpu")
    save_base(model, tokenizer, tmp_path / "saved")
    held = stored(tmp_path / "saved")
    size = count = 0
    for path, layer in quantised_layers(model).items():
        own = {"weight", "weight.absmax", "weight.nested_absmax"}  # the rest: a few bytes per layer
        size += sum(held[f"{path}.{name}"].numel() * held[f"{path}.{name}"].element_size() for name in own)
        count += layer.in_features * layer.out_features
    assert 8 * size / count <= 4.13


def test_the_layout_of_fp8_is_as_documented(tmp_path: Path) -> None:
    model, tokenizer = load_model("sprout", quantization="fp8", dtype="float32", device="cpu")
    save_base(model, tokenizer, tmp_path / "saved")
    held = stored(tmp_path / "saved")
    for path, layer in quantised_layers(model).items():
        codes, scales = held[f"{path}.weight"], held[f"{path}.weight_scale"]
        assert codes.dtype == torch.float8_e4m3fn and scales.shape == (layer.out_features, 1)
        assert torch.equal(codes.float() * scales, layer.weight)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "graft"


def test_transformers_alone_does_not_misread_fp8(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model("sprout", quantization="fp8", device="cpu")
    save_base(model, tokenizer, tmp_path / "saved")
    with pytest.raises(ModelError, match="quantised by Graft"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(("scheme", "double"), SCHEMES[:-2])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "t5", "mixtral", "cut-up"])
def test_transformers_with_bitsandbytes_loads_it(
    kind: str, scheme: str, double: bool, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = checkpoint(tmp_path / "dense", kind)
    model, tokenizer = load_model(folder, quantization=scheme, double_quant=double, dtype="float32")
    save_base(model, tokenizer, tmp_path / "saved")
    theirs, info = type(model).from_pretrained(tmp_path / "saved", device_map="cpu", output_loading_info=True)
    assert not any(info.values())
    for path, layer in quantised_layers(model).items():
        read = WeightHandle(theirs.get_submodule(path)).read()["weight"]
        assert torch.equal(read, layer.packed.decode(torch.float32)), path
    theirs.train()  # their decoding path: the other one rearranges weights, and rounds in bfloat16
    off = (logits(theirs, ids(kind)) - logits(model, ids(kind))).abs().max()
    assert off < (2e-2 if scheme == "int8" else 1e-4)  # their int8 rounds inputs to 8 bits as well


def test_transformers_reads_fp8_in_tiles(tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    folder = checkpoint(tmp_path / "dense", "llama")
    model, tokenizer = load_model(folder, quantization="fp8_block", dtype="float32")
    save_base(model, tokenizer, tmp_path / "saved")
    theirs = type(model).from_pretrained(
        tmp_path / "saved", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    for path, layer in quantised_layers(model).items():
        assert torch.equal(theirs.get_submodule(path).weight, layer.weight), path


def refuses(model: Any, tokenizer: Any, folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        save_base(model, tokenizer, folder)
    assert caught.value.fix and not folder.exists()
    return caught.value


def test_what_is_no_quantised_base_is_refused(tmp_path: Path) -> None:
    dense, tokenizer = load_model("sprout", device="cpu")
    assert "dense" in refuses(dense, tokenizer, tmp_path / "a").meaning
    model, _ = load_model("sprout", quantization="nf4", head="int8", device="cpu")
    assert "8 bits" in refuses(model, tokenizer, tmp_path / "b").seen
    model, _ = load_model("sprout", quantization="nf4", device="cpu")
    layer = next(iter(quantised_layers(model).values()))
    layer.dense = torch.nn.Parameter(layer.weight)
    assert "merged" in refuses(model, tokenizer, tmp_path / "c").seen
    layer.dense = None
    attach(model, LoraConfig(r=2), "default", storage=None)
    assert "adapters" in refuses(model, tokenizer, tmp_path / "d").seen


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    model, tokenizer = load_model("sprout", quantization="nf4", device="cpu")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError):
        save_base(model, tokenizer, tmp_path / "there")
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["notes.txt"]
