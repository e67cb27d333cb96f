from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.core.errors import ConfigError, ModelError
from graftlm.core.notices import collected, forget_notices
from graftlm.models.footprint import footprint
from graftlm.models.load import load_model
from graftlm.models.save_quantised import save_base
from graftlm.quant.convert import quantise, quantised_layers
from graftlm.quant.embedding import QuantisedEmbedding
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme
from graftlm.quant.storage import to_tensors
from graftlm.testing.models import batch, logits

from .bases import CAUSAL_AND_SEQUENCE, OTHERS, checkpoint, tokenizer

SCHEMES = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("fp8", True), ("fp8_block", True)]


@pytest.fixture(autouse=True)
def fresh_notices() -> Iterator[None]:
    forget_notices()
    yield
    forget_notices()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"), "llama", shards="60KB")


@pytest.fixture
def stored(llama: Path, tmp_path: Path) -> Path:
    """An NF4 checkpoint in one file, which a test may damage."""
    save_base(*load_model(llama, quantization="nf4", dtype="float32"), tmp_path / "nf4")
    return tmp_path / "nf4"


def equal_bits(left: Tensor, right: Tensor) -> bool:
    same = (left.dtype, left.shape) == (right.dtype, right.shape)
    return same and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def same_model(left: Any, right: Any) -> None:
    """Bit for bit the same weights, buffers, configs and modes."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not equal_bits(ours[name], theirs[name])] == []
    buffers = dict(right.named_buffers())
    assert all(equal_bits(buffer, buffers[name]) for name, buffer in left.named_buffers())
    assert left.config.to_dict() == right.config.to_dict()
    assert left.generation_config == right.generation_config
    assert not any(module.training for module in [*left.modules(), *right.modules()])


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def refused(folder: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(folder, **options)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("kind", CAUSAL_AND_SEQUENCE)
def test_quantising_while_reading_is_quantising_what_was_loaded(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, kind, shards="20KB", dtype=torch.bfloat16)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded, _ = load_model(folder, dtype="bfloat16", device="cpu")
    paths = quantise(loaded, Scheme("nf4"))
    read, _ = load_model(folder, dtype="bfloat16", device="cpu", quantization="nf4")
    assert list(quantised_layers(read)) == paths
    same_model(read, loaded)
    inputs = batch(kind if kind not in OTHERS else "llama")
    assert torch.equal(logits(read, inputs), logits(loaded, inputs))


@pytest.mark.parametrize(("kind", "double"), SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_scheme(llama: Path, kind: str, double: bool, dtype: str) -> None:
    loaded, _ = load_model(llama, dtype=dtype, device="cpu")
    quantise(loaded, Scheme(kind, double_quant=double))
    read, _ = load_model(llama, dtype=dtype, device="cpu", quantization=kind, double_quant=double)
    same_model(read, loaded)


def test_what_the_closing_line_says() -> None:
    model, _ = load_model("sprout", quantization="nf4", dtype="bfloat16", device="cpu")
    measured = footprint(model)
    assert measured.bits_per_parameter <= 4.13
    layers = quantised_layers(model).values()
    assert measured.packed_parameters == sum(layer.in_features * layer.out_features for layer in layers)
    embeddings = model.get_input_embeddings().weight  # tied: counted once
    assert measured.other_bytes["embeddings"] == embeddings.numel() * 2
    (line,) = collected()
    packed, _, dense = line.partition("; ")
    assert packed == "sprout: 1.5 MB as nf4 (4.13 bits per quantised parameter)"
    assert dense == "1.1 MB stays bfloat16: embeddings 1.0 MB, norms and biases 0.0 MB."


def test_experts_stay_as_they_are_and_that_is_said(tmp_path: Path) -> None:
    model, _ = load_model(checkpoint(tmp_path, "mixtral"), quantization="nf4", dtype="bfloat16")
    experts = [p for p in model.parameters() if p.dim() == 3]
    assert footprint(model).other_bytes["experts"] == sum(2 * p.numel() for p in experts) > 0
    assert "experts 0.4 MB" in collected()[-1]


def test_embeddings_in_8_bits(llama: Path) -> None:
    model, _ = load_model(llama, quantization="nf4", head="int8", dtype="bfloat16")
    assert isinstance(model.get_input_embeddings(), QuantisedEmbedding)
    assert "embeddings as int8" in str(footprint(model)) and "head as int8" in str(footprint(model))
    with pytest.raises(ConfigError, match=r"int9.*did you mean"):
        load_model(llama, quantization="nf4", head="int9")


def test_progress_counts_every_byte_once(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(llama, quantization="nf4", progress=lambda done, total: seen.append((done, total)))
    tensors = [tensor for file in llama.glob("*.safetensors") for tensor in load_file(file).values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert {total for _, total in seen} == {size} and seen[-1][0] == size
    assert all(before[0] < after[0] for before, after in itertools.pairwise(seen))


def test_values_that_are_not_finite_are_all_named(llama: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    bad = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    edit(folder, lambda tensors: [tensors[name][0].fill_(float("nan")) for name in bad])
    error = refused(folder, quantization="nf4")
    assert len(error.problems) == 2
    assert all(name in text for name, text in zip(bad, error.problems, strict=True))


def test_shapes_and_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(63)

    edit(folder, damage)
    problems = refused(folder, quantization="nf4").problems
    assert problems == (
        "model.layers.0.mlp.up_proj.weight: missing from the checkpoint",
        "model.norm.weight: stored as [63], the model has [64]",
    )
    folder = checkpoint(tmp_path / "other", "llama")
    edit(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(128, 60)}))
    (problem,) = refused(folder, quantization="nf4").problems
    assert problem == "model.layers.0.mlp.up_proj.weight: stored as [128, 60], the model has [128, 64]"


def test_an_unknown_quantization() -> None:
    with pytest.raises(ConfigError, match=r"'nf5'.*did you mean"):
        load_model("./nowhere", quantization="nf5")


def test_a_stored_base_stays_what_it_is(stored: Path) -> None:
    as_stored, _ = load_model(stored, dtype="float32")
    same_model(as_stored, load_model(stored, quantization="nf4", dtype="float32")[0])
    load_model(stored, quantization="none")
    with pytest.raises(ConfigError, match="stored as nf4") as caught:
        load_model(stored, quantization="int8")
    assert "16-bit original" in caught.value.fix


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4"])
def test_other_ways_of_quantising_are_refused_by_name(stored: Path, method: str) -> None:
    edit_config(stored, quantization_config={"quant_method": method, "bits": 4})
    error = refused(stored)
    assert f"quantised by {method}" in error.seen and "nf4" in error.fix


def test_every_damaged_weight_is_named(stored: Path) -> None:
    layer = "model.layers.{}.self_attn.{}_proj."

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[layer.format(0, "q") + "weight.absmax"]
        del tensors[layer.format(0, "k") + "weight"]
        tensors[layer.format(0, "v") + "weight"] = tensors[layer.format(0, "v") + "weight"][:-1].clone()
        tensors[layer.format(1, "q") + "weight.nested_absmax"].fill_(float("inf"))
        state = layer.format(1, "k") + "weight.quant_state.bitsandbytes__nf4"
        tensors[state] = torch.tensor(list(b'{"shape": [1000000, 1000000]}'), dtype=torch.uint8)
        for name in [name for name in tensors if name.startswith(layer.format(1, "v") + "weight.")]:
            del tensors[name]

    edit(stored, damage)
    problems = refused(stored).problems
    expected = [(0, "q"), (0, "k"), (0, "v"), (1, "q"), (1, "k"), (1, "v")]
    assert len(problems) == len(expected)
    assert all(any(layer.format(*place) + "weight" in text for text in problems) for place in expected)


def test_scales_of_int8_that_are_missing(llama: Path, tmp_path: Path) -> None:
    save_base(*load_model(llama, quantization="int8"), tmp_path / "int8")

    def damage(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("q_proj.SCB", "q_proj.weight_format"))]:
            del tensors[name]

    edit(tmp_path / "int8", damage)
    problems = refused(tmp_path / "int8").problems
    assert len(problems) == 2 and all("int8 without scales" in text for text in problems)


def test_a_config_that_calls_dense_weights_quantised(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "no quantised weight" in refused(folder).seen


def test_experts_that_were_quantised_one_by_one(tmp_path: Path) -> None:
    """Old checkpoints hold packed experts, which today's architecture stacks: they are decoded."""
    folder = checkpoint(tmp_path, "mixtral")
    reference, _ = load_model(folder, dtype="float32")
    decoded: dict[str, Tensor] = {}

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name or "_proj" in name]:
            packed = encode(tensors.pop(name), Scheme("nf4"))
            decoded[name] = packed.decode()
            path = name.removesuffix("weight")
            tensors |= {path + suffix: part for suffix, part in to_tensors(packed, torch.float32).items()}

    edit(folder, pack)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    model, _ = load_model(folder, dtype="float32")
    dense = dict(reference.named_parameters())
    assert len(quantised_layers(model)) == 8
    for path, layer in quantised_layers(model).items():
        assert torch.equal(layer.weight, decoded[f"{path}.weight"])
    experts = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    assert len(experts) == 4
    for name, parameter in experts.items():
        off = (parameter - dense[name]).abs().max()
        assert 0 < off < 0.2 * dense[name].abs().max(), name


def test_a_base_in_the_cache_of_the_hub(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "models--somebody--small" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--somebody--small" / "refs").mkdir()
    (tmp_path / "models--somebody--small" / "refs" / "main").write_text("a" * 40)
    for file in llama.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found, _ = load_model("somebody/small", quantization="nf4")
    assert [line.partition(":")[0] for line in capfd.readouterr().err.splitlines()] == ["note"], "no bars"
    expected, _ = load_model(llama, quantization="nf4")
    found.config._name_or_path = expected.config._name_or_path
    same_model(found, expected)


def test_an_index_that_leads_out_of_its_folder(llama: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", "llama", shards="60KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"].values()))
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    index.write_text(json.dumps(content).replace(name, f"../{name}"))
    assert refused(folder, quantization="nf4").problems == (f"../{name}",)


@pytest.mark.parametrize(
    "options", [{"quant_type": "nf4", "double": True}, {"quant_type": "fp4", "double": False}, {}]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_bitsandbytes_stored(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers quantises with bitsandbytes and saves; we load that without it, to the bit."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = checkpoint(tmp_path / "dense", kind)
    asked = BitsAndBytesConfig(
        load_in_4bit=bool(options),
        load_in_8bit=not options,
        bnb_4bit_quant_type=options.get("quant_type", "fp4"),
        bnb_4bit_use_double_quant=options.get("double", False),
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it fails from here on
    model, _ = load_model(tmp_path / "theirs", dtype="float32")
    own = {name: tensor for name, tensor in model.state_dict().items() if name in saved}
    state = ".quant_state."  # a JSON text, in which only values count
    assert saved.keys() == own.keys() and len(quantised_layers(model)) in (8, 14)
    assert [name for name in saved if state not in name and not equal_bits(saved[name], own[name])] == []
    for name in (name for name in saved if state in name):
        texts = [json.loads(bytes(tensors[name].tolist())) for tensors in (saved, own)]
        assert texts[0] == texts[1]
    if options:  # its int8 rounds to float16 first
        dense, _ = load_model(folder, dtype="float32")
        quantise(dense, next(iter(quantised_layers(model).values())).scheme)
        assert torch.equal(logits(model, batch(kind)), logits(dense, batch(kind)))
