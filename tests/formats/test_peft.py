"""PEFT 0.21 as the oracle of the format: its files load here, ours load there, and the logits agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.core.errors import TargetError
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach, attach_folder
from graftlm.methods.lora import LoraConfig

from ..methods.tiny import batch, logits, stir, tiny
from .peers import noisy

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
)
"""What PEFT says about tiny models without a name."""

NAMES = ("adapter_config.json", "adapter_model.safetensors")
LLAMA = ("q_proj", "v_proj")

# kind of model, task, fields of both configs
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "list": ("llama", "CAUSAL_LM", {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}),
    "regex": ("llama", "CAUSAL_LM", {"r": 3, "target_modules": r".*\.layers\.1\..*\.(q|down)_proj"}),
    "all-linear": ("llama", "CAUSAL_LM", {"r": 4, "target_modules": "all-linear"}),
    "tied": ("llama-tied", "CAUSAL_LM", {"r": 4, "target_modules": "all-linear"}),
    "rslora": ("llama", None, {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": ["k_proj"]}),
    "layers": ("llama", None, {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "one layer": (
        "llama",
        None,
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "excluded": ("llama", None, {"r": 2, "target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "excluded by regex": (
        "llama",
        None,
        {"r": 2, "target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.0.*"},
    ),
    "conv1d": ("gpt2", "CAUSAL_LM", {"r": 4, "target_modules": ["c_attn", "c_proj"]}),
    "conv1d all": ("gpt2", "CAUSAL_LM", {"r": 4, "target_modules": "all-linear", "bias": "all"}),
    "embedding": ("llama", "CAUSAL_LM", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "wte": ("gpt2", "CAUSAL_LM", {"r": 4, "target_modules": ["wte", "c_fc"]}),
    "scaled embedding": ("gemma3", "CAUSAL_LM", {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "head": ("llama", "CAUSAL_LM", {"r": 4, "target_modules": ["lm_head"]}),
    "bias lora_only": ("bert", None, {"r": 4, "target_modules": ["query", "value"], "bias": "lora_only"}),
    "bias all": ("bert", None, {"r": 4, "target_modules": ["query", "value"], "bias": "all"}),
    "saved head": ("bert", None, {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "saved block": (
        "roberta",
        None,
        {"r": 4, "target_modules": ["query", "dense"], "modules_to_save": ["classifier"]},
    ),
    "classification": ("bert", "SEQ_CLS", {"r": 4, "target_modules": ["query", "value"]}),
    "saved lm_head": ("llama", None, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved norm": ("llama", None, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "saved norms": (
        "llama",
        None,
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm"]},
    ),
    "t5": ("t5", "SEQ_2_SEQ_LM", {"r": 4, "target_modules": ["q", "v"]}),
    "t5 all-linear": ("t5", "SEQ_2_SEQ_LM", {"r": 4, "target_modules": "all-linear"}),
    "bart": ("bart", "SEQ_2_SEQ_LM", {"r": 4, "target_modules": ["q_proj", "fc1"]}),
}


def theirs(kind: str, task: str | None, fields: dict[str, Any]) -> Any:
    """A PEFT model whose adapter changes the output."""
    torch.manual_seed(1)
    config = peft.LoraConfig(init_lora_weights=False, task_type=task, **fields)
    model = peft.get_peft_model(tiny(kind), config).eval()
    return noisy(model)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / NAMES[1])


def without_copies_of_the_base(keys: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """PEFT writes the base's own embedding table beside an adapted one; here that is done on demand only."""
    return {k: tuple(t.shape) for k, t in keys.items() if not k.endswith("base_layer.weight")}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_loads_here(case: str, tmp_path: Path) -> None:
    kind, task, fields = CASES[case]
    model = theirs(kind, task, fields)
    expected = logits(model, batch(kind))
    model.save_pretrained(tmp_path / "theirs")

    ours = tiny(kind)
    adapters = attach_folder(ours, tmp_path / "theirs", storage=FOLDER)
    torch.testing.assert_close(logits(ours, batch(kind)), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(tiny(kind), batch(kind)), expected, atol=1e-3)
    adapters.save(tmp_path / "ours")
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert without_copies_of_the_base(before) == without_copies_of_the_base(after)
    assert all(torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_here_loads_in_peft(case: str, tmp_path: Path) -> None:
    kind, task, fields = CASES[case]
    ours = tiny(kind)
    if case == "classification":
        fields = fields | {"modules_to_save": ["classifier"]}
    config = LoraConfig(init_lora_weights=False, task_type=task, **fields)
    adapters = attach(ours, config, storage=FOLDER)
    stir(adapters)
    expected = logits(ours, batch(kind))
    adapters.save(tmp_path)
    assert json.loads((tmp_path / NAMES[0]).read_text())["fan_in_fan_out"] is (kind == "gpt2")

    model = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    torch.testing.assert_close(logits(model, batch(kind)), expected, rtol=0, atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    assert without_copies_of_the_base(tensors(tmp_path / "again")) == without_copies_of_the_base(
        tensors(tmp_path)
    )


@pytest.mark.parametrize("target", ["attention", "mlp", "all-linear", ["mlp", "q_proj"]])
@pytest.mark.parametrize("exclude", [None, "mlp", ["attention", "lm_head"]])
@pytest.mark.parametrize("layers", [None, 1])
def test_roles_are_written_as_names_that_select_the_same_in_peft(
    target: Any, exclude: Any, layers: int | None, tmp_path: Path
) -> None:
    ours = tiny("llama")
    config = LoraConfig(r=2, target_modules=target, exclude_modules=exclude, layers_to_transform=layers)
    if (target, exclude) in (("mlp", "mlp"), ("attention", ["attention", "lm_head"])):
        with pytest.raises(TargetError, match="excluded again"):
            attach(ours, config, storage=FOLDER)
        return
    adapters = attach(ours, config, storage=FOLDER)
    stir(adapters)
    adapters.save(tmp_path)
    model: Any = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    adapted = {
        n for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert adapted == set(adapters.parts("default"))
    torch.testing.assert_close(logits(model, batch("llama")), logits(ours, batch("llama")), rtol=0, atol=1e-5)


def test_the_config_that_is_written_is_one_that_peft_would_write(tmp_path: Path) -> None:
    adapters: AdapterSet = attach(tiny("llama"), LoraConfig(target_modules="attention"), storage=FOLDER)
    adapters.save(tmp_path)
    content = json.loads((tmp_path / NAMES[0]).read_text())
    known = set(vars(peft.LoraConfig()))
    assert set(content) <= known
    assert content["inference_mode"] is True and content["peft_type"] == "LORA"
    assert content["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_a_file_of_four_keys_loads_with_pefts_defaults(tmp_path: Path) -> None:
    model = theirs("llama", None, {"target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path)
    (tmp_path / NAMES[0]).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    ours = tiny("llama")
    adapters = attach_folder(ours, tmp_path, storage=FOLDER)
    config = adapters.config("default")
    assert isinstance(config, LoraConfig) and (config.r, config.lora_alpha) == (8, 8)
    expected = logits(model, batch("llama"))
    torch.testing.assert_close(logits(ours, batch("llama")), expected, rtol=0, atol=1e-5)


def test_the_config_of_an_old_peft_loads(tmp_path: Path) -> None:
    """Empty lists where newer versions write null, and no `peft_version`."""
    theirs("llama", None, {"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    path = tmp_path / NAMES[0]
    content = json.loads(path.read_text())
    content |= {"layers_pattern": [], "exclude_modules": [], "modules_to_save": []}
    content |= {"rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": []}
    del content["peft_version"]
    path.write_text(json.dumps(content))
    attach_folder(tiny("llama"), tmp_path, storage=FOLDER)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "_fsdp_wrapped_module."])
def test_wrappers_left_in_keys_are_looked_through(prefix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = theirs("llama", None, {"target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path)
    start = "base_model.model."
    renamed = {start + prefix + k.removeprefix(start): t for k, t in tensors(tmp_path).items()}
    save_file(renamed, tmp_path / NAMES[1])
    ours = tiny("llama")
    attach_folder(ours, tmp_path, storage=FOLDER)
    expected = logits(model, batch("llama"))
    torch.testing.assert_close(logits(ours, batch("llama")), expected, rtol=0, atol=1e-5)


def test_a_resized_vocabulary_that_peft_wrote_is_recognised(tmp_path: Path) -> None:
    """`save_embedding_layers=True` writes the table under its plain name when it is not adapted."""
    model = theirs("llama", "CAUSAL_LM", {"target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(key.endswith("embed_tokens.weight") for key in tensors(tmp_path))
    ours = tiny("llama")
    attach_folder(ours, tmp_path, storage=FOLDER)
    expected = logits(model, batch("llama"))
    torch.testing.assert_close(logits(ours, batch("llama")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["stories260K", "gpt2-tiny-en"])
def test_real_models_round_trip_through_peft(name: str, shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(shared / "models" / name).eval()

    inputs = {"input_ids": torch.arange(3, 40).view(1, -1)}
    ours = base()
    adapters = attach(ours, LoraConfig(r=8, target_modules="all-linear", bias="all"), storage=FOLDER)
    stir(adapters)
    adapters.save(tmp_path)
    model = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(model, inputs), logits(ours, inputs), rtol=0, atol=1e-4)
    again = base()
    attach_folder(again, tmp_path, storage=FOLDER)
    assert torch.equal(logits(again, inputs), logits(ours, inputs))
