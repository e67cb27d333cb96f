"""Gated prompts in the top layers, against PEFT, and beside other adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from graftlm.core.errors import MergeError, TargetError
from graftlm.formats.layout import FOLDER
from graftlm.methods.adaption_prompt import AdaptionPromptConfig
from graftlm.methods.attach import attach_folder
from graftlm.methods.lora import LoraConfig

from .tiny import DECODER, batch, graft, logits, snapshot, stir, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
)

CONFIG = AdaptionPromptConfig(adapter_len=4, adapter_layers=1)
TENSORS = "adapter_model.safetensors"


def base(kind: str) -> Any:
    if kind != "mistral":
        return tiny(kind)
    torch.manual_seed(0)
    config = transformers.MistralConfig(**{**DECODER, "tie_word_embeddings": False})
    return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("layers", [1, 2])
def test_files_and_logits_are_those_of_peft(kind: str, layers: int, tmp_path: Path) -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=layers)
    theirs: Any = peft.get_peft_model(base(kind), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.7)
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = batch("llama")
    inputs["attention_mask"][1, 4:] = 0
    expected = logits(theirs, inputs)

    ours = base(kind)
    adapters = attach_folder(ours, tmp_path / "theirs", storage=FOLDER)
    torch.testing.assert_close(logits(ours, inputs), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(base(kind), inputs), atol=1e-3)
    adapters.save(tmp_path / "ours")
    before, after = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(fields) <= set(vars(config))
    again: Any = peft.PeftModel.from_pretrained(base(kind), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(again, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_begins_as_the_base_and_leaves_nothing(kind: str) -> None:
    model = tiny(kind)
    expected, unchanged = logits(model, batch(kind)), snapshot(model)
    adapters = graft(model, CONFIG)
    assert torch.equal(logits(model, batch(kind)), expected)
    stir(adapters)
    assert not torch.allclose(logits(model, batch(kind)), expected, atol=1e-4)
    with adapters.disabled():
        assert torch.equal(logits(model, batch(kind)), expected)
    with pytest.raises(MergeError):
        adapters.merge()
    adapters.detach()
    unchanged()


def test_the_order_of_adapters_at_one_attention_does_not_matter() -> None:
    model = tiny("llama")
    adapters = graft(model, CONFIG, "a")
    adapters.add("b", LoraConfig(r=4, target_modules=["v_proj", "o_proj"], init_lora_weights=False))
    stir(adapters, "a")
    attention, found = model.model.layers[1].self_attn, []
    hook = attention.register_forward_hook(lambda module, args, output: found.append(output[0].detach()))
    for active in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        with adapters.activated(active):
            logits(model, {"input_ids": batch("llama")["input_ids"]})
    hook.remove()
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[2], found[0]) and not torch.equal(found[2], found[1])


def test_the_top_layers_have_it_by_default() -> None:
    model = tiny("llama", num_hidden_layers=5)
    paths = list(graft(model, AdaptionPromptConfig()).parts("default"))
    assert paths == [f"model.layers.{number}.self_attn" for number in (2, 3, 4)]


def test_models_of_another_kind_are_refused() -> None:
    for kind in ("t5", "bert", "gemma3"):
        with pytest.raises(TargetError, match="attention layers of a known kind"):
            graft(tiny(kind), CONFIG)
    with pytest.raises(TargetError, match="has 2 attention layers"):
        graft(tiny("llama"), CONFIG.replace(adapter_layers=3))
