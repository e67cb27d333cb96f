"""PEFT 0.21 as the oracle of prompt and prefix tuning: files, logits, losses and greedy text, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig

from ..methods.tiny import batch, graft, logits, stir, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:Position ids are not supported for parameter efficient tuning:UserWarning",
)
"""What PEFT says about tiny models without a name, and about what it does not do."""

FIELDS = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
TASKS = {
    **dict.fromkeys(("llama", "gpt2", "gemma3"), "CAUSAL_LM"),
    **dict.fromkeys(("t5", "bart"), "SEQ_2_SEQ_LM"),
    **dict.fromkeys(("bert", "roberta"), "SEQ_CLS"),
}
WRITERS = ("llama", "gpt2", "gemma3", "t5", "bart")
METHODS: dict[str, tuple[Any, Any]] = {
    "prefix": (PrefixTuningConfig, peft.PrefixTuningConfig),
    "prompt": (PromptTuningConfig, peft.PromptTuningConfig),
}
TOKENS = 5


def theirs(kind: str, method: str, **fields: Any) -> Any:
    torch.manual_seed(1)
    config = METHODS[method][1](task_type=TASKS[kind], num_virtual_tokens=TOKENS, **fields)
    return peft.get_peft_model(tiny(kind), config).eval()


def padded(kind: str) -> dict[str, Tensor]:
    """Right padding, which PEFT gets right in a forward pass."""
    inputs = batch(kind)
    inputs["attention_mask"][1, 4:] = 0
    return inputs


def real(kind: str, found: Tensor) -> Tensor:
    """PEFT's logits of causal models have the virtual tokens in front."""
    return found[:, -7:] if TASKS[kind] == "CAUSAL_LM" else found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TASKS)
def test_what_peft_saves_loads_here_and_is_saved_alike(kind: str, method: str, tmp_path: Path) -> None:
    model, inputs = theirs(kind, method), padded(kind)
    model.save_pretrained(tmp_path / "theirs")
    ours = tiny(kind)
    adapters = attach_folder(ours, tmp_path / "theirs", storage=FOLDER)
    expected = real(kind, logits(model, inputs))
    torch.testing.assert_close(logits(ours, inputs), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(**inputs).loss, model(**inputs).loss, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(tiny(kind), inputs), expected, atol=1e-4)
    adapters.save(tmp_path / "ours")
    before, after = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "ours" / TENSORS)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    said, says = (json.loads((tmp_path / name / FIELDS).read_text()) for name in ("theirs", "ours"))
    for field in ("peft_version", "base_model_name_or_path", "modules_to_save"):
        said.pop(field), says.pop(field, None)
    assert says == said


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TASKS)
def test_what_is_saved_here_loads_in_peft(kind: str, method: str, tmp_path: Path) -> None:
    inputs, ours = padded(kind), tiny(kind)
    copied = ("classifier",) if TASKS[kind] == "SEQ_CLS" else None
    adapters = graft(ours, METHODS[method][0](num_virtual_tokens=TOKENS, modules_to_save=copied))
    stir(adapters)
    adapters.save(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path)).eval()
    expected = logits(ours, inputs)
    torch.testing.assert_close(real(kind, logits(model, inputs)), expected, rtol=0, atol=1e-5)
    if copied:
        assert sum(key.startswith("base_model.classifier.") for key in load_file(tmp_path / TENSORS)) > 1
    again = tiny(kind)
    attach_folder(again, tmp_path, storage=FOLDER)
    assert torch.equal(logits(again, inputs), expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", WRITERS)
def test_both_write_the_same_text(kind: str, method: str, beams: int, tmp_path: Path) -> None:
    model = theirs(kind, method)
    model.save_pretrained(tmp_path)
    ours = tiny(kind)
    attach_folder(ours, tmp_path, storage=FOLDER)
    inputs = {key: value for key, value in batch(kind).items() if key != "labels"}
    if kind in ("t5", "bart"):
        inputs["attention_mask"][1, 4:] = 0
    elif method == "prefix":  # left padding; with a prompt PEFT counts it, see below
        inputs["attention_mask"][1, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("projected", [False, True])
def test_the_projection_of_peft_arrives_folded(projected: bool, tmp_path: Path) -> None:
    model = theirs("llama", "prefix", prefix_projection=projected, encoder_hidden_size=12)
    expected = logits(model, padded("llama"))
    model.save_pretrained(tmp_path)
    ours = tiny("llama")
    adapters = attach_folder(ours, tmp_path, storage=FOLDER)
    torch.testing.assert_close(logits(ours, padded("llama")), expected, rtol=0, atol=1e-5)
    assert [parameter.requires_grad for parameter in adapters.parameters("default")] == [True]


def test_a_projection_trained_here_loads_in_peft(tmp_path: Path) -> None:
    ours = tiny("llama")
    adapters = graft(ours, PrefixTuningConfig(num_virtual_tokens=TOKENS, prefix_projection=True))
    stir(adapters)
    adapters.save(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(
        logits(model, padded("llama")), logits(ours, padded("llama")), rtol=0, atol=1e-5
    )


def test_peft_trains_the_same_prompt_by_the_same_losses() -> None:
    ours = tiny("llama")
    torch.manual_seed(4)
    adapters = graft(
        ours,
        PromptTuningConfig(num_virtual_tokens=TOKENS, prompt_tuning_init="RANDOM", task_type="CAUSAL_LM"),
    )
    config, base = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS), tiny("llama")
    torch.manual_seed(4)
    model = peft.get_peft_model(base, config)
    optimizers = [
        torch.optim.AdamW(parameters, lr=0.05)
        for parameters in (adapters.parameters("default"), model.prompt_encoder.parameters())
    ]
    for step in range(4):
        losses = [one(**batch("llama", seed=step)).loss for one in (ours, model)]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_left_padding_shifts_the_positions_of_a_prompt_in_peft(tmp_path: Path) -> None:
    """Here a padded row gives what it gives alone; in PEFT it gives something else."""
    model = theirs("gpt2", "prompt")
    model.save_pretrained(tmp_path)
    ours = tiny("gpt2")
    attach_folder(ours, tmp_path, storage=FOLDER)
    inputs = batch("gpt2")
    del inputs["labels"]
    inputs["attention_mask"][1, :3] = 0
    alone = {key: value[1:2, 3:] for key, value in inputs.items()}
    torch.testing.assert_close(logits(ours, inputs)[1, 3:], logits(ours, alone)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(ours, alone), logits(model, alone)[:, TOKENS:], rtol=0, atol=1e-5)
    padded_there = logits(model, inputs)[1, TOKENS + 3 :]
    assert (padded_there - logits(model, alone)[0, TOKENS:]).abs().max() > 1e-3
