"""PEFT as the oracle for DoRA, patterns, biases of updates and layer filters: files in both directions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.formats.layout import FOLDER
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
    "ignore:`lora_bias=True` was passed but the targeted layer",
    "ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape",  # PEFT's own `lora_bias`
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PATTERNS = {"layers.0.self_attn.q_proj": 3, "q_proj": 2, "layers.1.mlp.*": 5}
ALPHAS = {"up_proj": 7, r".*\.layers\.1\..*": 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True, "target_modules": "all-linear"}),
    "dora, rslora": ("llama", {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj"]}),
    "dora, conv1d": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "dora, embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}),
    "dora, tied embedding": ("gpt2", {"use_dora": True, "target_modules": ["wte"]}),
    "dora, scaled embedding": ("gemma3", {"use_dora": True, "target_modules": ["embed_tokens"]}),
    "dora, t5": ("t5", {"use_dora": True, "target_modules": ["q", "v", "wi", "wo"]}),
    "dora, biases": ("bert", {"use_dora": True, "target_modules": ["value", "dense"], "bias": "lora_only"}),
    "dora, head": (
        "bert",
        {"use_dora": True, "target_modules": ["value"], "modules_to_save": ["classifier"]},
    ),
    "patterns": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": PATTERNS, "alpha_pattern": ALPHAS},
    ),
    "patterns, rslora": (
        "llama",
        {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}
        | {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 9}},
    ),
    "patterns, dora": (
        "gpt2",
        {"target_modules": ["wte", "c_attn"], "use_dora": True}
        | {"rank_pattern": {"wte": 2}, "alpha_pattern": {"h.1.attn.c_attn": 9}},
    ),
    "bias of the update": ("bert", {"target_modules": ["query", "dense"], "lora_bias": True}),
    "bias of the update, no bias below": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    "bias of the update, conv1d": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "bias of the update, rslora": (
        "bert",
        {"target_modules": ["value"], "lora_bias": True, "use_rslora": True},
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "layers, named": (
        "t5",
        {"target_modules": ["q", "wo"], "layers_to_transform": [0], "layers_pattern": ["block"]},
    ),
    "layers, dora": ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": 1, "use_dora": True}),
}


def saved(folder: Path) -> dict[str, Tensor]:
    """PEFT writes the base's embedding beside an adapted one; here that is done on demand only."""
    found = load_file(folder / TENSORS)
    return {key: tensor for key, tensor in found.items() if not key.endswith("base_layer.weight")}


def theirs(kind: str, fields: dict[str, Any]) -> Any:
    """PEFT's model with noise on every trained number."""
    config = peft.LoraConfig(**fields, init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(tiny(kind), config).eval()
    return noisy(model)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_loads_here_and_is_saved_the_same(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    fields = {"r": 4, "lora_alpha": 6} | fields
    expected = logits(model := theirs(kind, fields), batch(kind))
    model.save_pretrained(tmp_path / "theirs")
    if "rank_pattern" in fields:  # PEFT's files lose the order; this case is about the rest
        restore_order(tmp_path / "theirs", fields)

    ours = tiny(kind)
    adapters = attach_folder(ours, tmp_path / "theirs", storage=FOLDER)
    torch.testing.assert_close(logits(ours, batch(kind)), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(tiny(kind), batch(kind)), expected, atol=1e-3)
    adapters.save(tmp_path / "ours")
    before, after = saved(tmp_path / "theirs"), saved(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)


def restore_order(folder: Path, fields: dict[str, Any]) -> None:
    content = json.loads((folder / CONFIG).read_text())
    content |= {key: fields[key] for key in ("rank_pattern", "alpha_pattern") if key in fields}
    (folder / CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_here_loads_in_peft(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    ours = tiny(kind)
    adapters = attach(ours, LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **fields), storage=FOLDER)
    stir(adapters)
    expected = logits(ours, batch(kind))
    adapters.save(tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(model, batch(kind)), expected, rtol=0, atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    again, own = saved(tmp_path / "again"), saved(tmp_path / "ours")
    assert {k: t.shape for k, t in again.items()} == {k: t.shape for k, t in own.items()}

    back = tiny(kind)
    attach_folder(back, tmp_path / "ours", storage=FOLDER)
    assert torch.equal(logits(back, batch(kind)), expected)


@pytest.mark.parametrize("order", list(itertools.permutations(PATTERNS)))
def test_overlapping_patterns_mean_the_same_after_a_file_in_any_order(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    """The file's keys are sorted, so that precedence must not rest on their order."""
    ranks = {pattern: PATTERNS[pattern] for pattern in order}
    alphas = dict(reversed(ALPHAS.items())) if order[0] == "q_proj" else ALPHAS
    ours = tiny("llama")
    config = LoraConfig(r=4, rank_pattern=ranks, alpha_pattern=alphas)
    adapters = attach(ours, config, storage=FOLDER)
    first = 3 if order.index("layers.0.self_attn.q_proj") < order.index("q_proj") else 2
    part = adapters.parts("default")["model.layers.0.self_attn.q_proj"]
    assert part.get_parameter("lora_A").shape[0] == first
    stir(adapters)
    adapters.save(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    expected = logits(ours, batch("llama"))
    torch.testing.assert_close(logits(model, batch("llama")), expected, rtol=0, atol=1e-5)
    back = tiny("llama")
    attach_folder(back, tmp_path, storage=FOLDER)
    assert torch.equal(logits(back, batch("llama")), expected)


def test_patterns_that_do_not_overlap_are_written_as_given(tmp_path: Path) -> None:
    config = LoraConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"mlp.up_proj": 3, "mlp.down_proj": 2})
    attach(tiny("llama"), config, storage=FOLDER).save(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    assert content["rank_pattern"] == config.rank_pattern
    assert content["alpha_pattern"] == config.alpha_pattern


def test_a_pattern_in_pefts_file_that_matches_nothing_is_harmless(tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"nowhere": 2, "layers.0.*": 3}}
    model = theirs("llama", fields)
    model.save_pretrained(tmp_path)
    ours = tiny("llama")
    attach_folder(ours, tmp_path, storage=FOLDER)
    expected = logits(model, batch("llama"))
    torch.testing.assert_close(logits(ours, batch("llama")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [r".*\.(q_proj|up_proj)", "attention", ["q_proj", "mlp"]])
def test_layers_are_chosen_the_same_in_peft(targets: Any, tmp_path: Path) -> None:
    """PEFT takes no `layers_to_transform` beside an expression: names are written instead."""
    ours = tiny("llama")
    adapters = attach(ours, LoraConfig(r=2, target_modules=targets, layers_to_transform=1), storage=FOLDER)
    stir(adapters)
    adapters.save(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    expected = logits(ours, batch("llama"))
    torch.testing.assert_close(logits(model, batch("llama")), expected, rtol=0, atol=1e-5)


def test_layers_of_a_model_that_begins_with_them_are_chosen_the_same_in_peft(tmp_path: Path) -> None:
    """PEFT looks for a number after two names; `layers.0.` has one before it."""
    ours = tiny("llama").model
    adapters = attach(ours, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=1), storage=FOLDER)
    stir(adapters)
    adapters.save(tmp_path)
    inputs = {"input_ids": batch("llama")["input_ids"]}
    model = peft.PeftModel.from_pretrained(tiny("llama").model, tmp_path).eval()
    with torch.no_grad():
        expected = ours(**inputs).last_hidden_state
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)
