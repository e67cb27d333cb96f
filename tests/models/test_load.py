from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlm.core.errors import ConfigError, ModelError
from graftlm.core.notices import collected, forget_notices
from graftlm.models import precision
from graftlm.models.load import load_model, load_tokenizer
from graftlm.models.sprout import FOLDER

WORDS = ["<s>", "</s>", "<unk>", *"abcdefghijklm"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "base"))


@pytest.fixture(autouse=True)
def fresh_notices() -> Iterator[None]:
    forget_notices()
    yield
    forget_notices()


def edit_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def refused(base: Path | str, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(base, **options)
    assert caught.value.fix
    return caught.value


def test_a_folder(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(base, device="cpu")
    stored = load_file(base / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    assert not model.training
    assert tokenizer("a b")["input_ids"] == [3, 4]
    assert collected() == ()
    assert capfd.readouterr() == ("", ""), "loading says nothing when there is nothing to say"


def test_the_tokenizer_alone_is_the_same(base: Path) -> None:
    _, tokenizer = load_model(base)
    alone = load_tokenizer(base)
    assert alone.get_vocab() == tokenizer.get_vocab()
    assert alone.pad_token_id == tokenizer.pad_token_id


@pytest.mark.skipif(not (FOLDER / "config.json").exists(), reason="the embedded base is not built yet")
def test_sprout() -> None:
    model, tokenizer = load_model("sprout")
    assert model.config.model_type == "llama"
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("stories260K", "LlamaForCausalLM"),
        ("gpt2-tiny-en", "GPT2LMHeadModel"),
        ("g2p-bart-gb", "BartForConditionalGeneration"),
    ],
)
def test_real_models(name: str, kind: str, shared: Path) -> None:
    model, tokenizer = load_model(shared / "models" / name)
    assert type(model).__name__ == kind
    assert tokenizer.pad_token_id < model.get_input_embeddings().weight.shape[0]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_real_encoder_is_refused(shared: Path) -> None:
    error = refused(shared / "models" / "roberta-tiny-en")
    assert "RobertaForMaskedLM" in error.seen


def test_a_backbone_without_head_is_refused(base: Path) -> None:
    edit_config(base, architectures=["LlamaModel"])
    assert "LlamaModel" in refused(base).seen


def test_an_architecture_that_is_not_written_is_inferred(base: Path) -> None:
    edit_config(base, architectures=None)
    assert type(load_model(base)[0]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "two words", "a/b/c"])
def test_paths_that_are_not_there(name: str) -> None:
    assert name in refused(name).seen


def test_a_file_instead_of_its_folder(base: Path) -> None:
    assert str(base) in refused(base / "config.json").fix


def test_a_hub_id_that_is_not_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = refused("nobody/nothing-of-this-name")
    assert "nobody/nothing-of-this-name" in error.seen
    assert "HF_HUB_OFFLINE" in error.meaning
    assert "did you mean 'sprout'" in refused("sprot").seen


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    error = refused(tmp_path)
    assert "config.json" in error.seen
    assert "notes.txt" in error.meaning


@pytest.mark.parametrize("place", ["", "adapter"])
def test_an_adapter_or_a_run_names_its_base(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    error = refused(tmp_path)
    assert ("a run" if place else "an adapter") in error.seen
    assert error.fix == "Give the base: Qwen/Qwen3-0.6B"


def test_pickled_weights_are_never_opened(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    error = refused(base)
    assert "pytorch_model.bin" in error.seen
    assert "safetensors" in error.meaning


def test_no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()
    assert "no weights" in refused(base).seen


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_weights_cut_short(base: Path, keep: int) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refused(base).seen


def test_weights_that_are_noise(base: Path) -> None:
    (base / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    assert "model.safetensors is corrupt" in refused(base).seen


def test_a_missing_shard(base: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refused(base).seen


def test_missing_and_misshapen_weights_are_all_named(base: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(3)

    edit_weights(base, damage)
    error = refused(base)
    assert error.problems == (
        "model.layers.0.mlp.up_proj.weight: missing from the checkpoint",
        "model.norm.weight: stored as [3], the model has [16]",
    )


def test_left_over_weights_are_a_notice(base: Path) -> None:
    edit_weights(base, lambda tensors: tensors.update(zorp=torch.ones(3)))
    load_model(base)
    assert "zorp" in collected()[0]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_damaged_json_is_named(base: Path, file: str) -> None:
    (base / file).write_text('{"a":')
    assert file in refused(base).seen


def test_no_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(base).seen


def test_an_unknown_architecture(base: Path) -> None:
    edit_config(base, model_type="zorp")
    error = refused(base)
    assert "zorp" in error.seen


def test_code_of_a_checkpoint_is_not_run(base: Path) -> None:
    edit_config(base, model_type="zorp", auto_map={"AutoConfig": "code.ZorpConfig"})
    (base / "code.py").write_text("raise SystemExit('ran')")
    refused(base)


@pytest.mark.parametrize("name", ["float32", "fp32", torch.float32])
def test_a_dtype_that_is_asked_for(base: Path, name: Any) -> None:
    edit_weights(base, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    edit_config(base, dtype="bfloat16")
    assert load_model(base, dtype=name, device="cpu")[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("stored", "hardware", "runs_in", "said"),
    [
        (torch.float32, False, torch.float32, False),
        (torch.bfloat16, True, torch.bfloat16, False),
        (torch.bfloat16, False, torch.float32, True),
        (torch.float16, True, torch.float32, True),
    ],
)
@pytest.mark.parametrize("in_config", [True, False])
def test_auto_dtype_on_a_cpu(
    base: Path,
    stored: torch.dtype,
    hardware: bool,
    runs_in: torch.dtype,
    said: bool,
    in_config: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: hardware)
    edit_weights(base, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    edit_config(base, dtype=str(stored).removeprefix("torch.") if in_config else None)
    model, _ = load_model(base, device="cpu")
    assert model.dtype == runs_in
    assert bool(collected()) == said


@pytest.mark.gpu
def test_auto_on_a_gpu(base: Path) -> None:
    model, _ = load_model(base)
    assert model.device.type == "cuda"
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "near"), [("bfloat", "'bfloat16'"), ("int8", "Unknown dtype 'int8'")])
def test_an_unknown_dtype(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        load_model("./nowhere", dtype=name)


def test_none_is_no_quantization(base: Path) -> None:
    load_model(base, quantization="none")


def test_devices_that_are_not_there(base: Path) -> None:
    assert "zorp" in refused(base, device="zorp").seen
    assert "cuda:77" in refused(base, device="cuda:77").seen


def test_a_tokenizer_with_more_tokens_than_rows(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(base)
    load_model(base)
    assert "17 tokens" in collected()[0]
