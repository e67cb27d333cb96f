"""Notes of somebody's own loop: of models of PEFT and of Graft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graftlm as gl
from graftlm.core.errors import FormatError
from graftlm.integrations.diagnosis_callback import DiagnosisCallback
from graftlm.integrations.loop_state import STATE, note_evaluation, note_training, read_state

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")

INPUTS = {"input_ids": torch.tensor([[3, 4, 5, 6]])}


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def adapted(kind: str, **settings: Any) -> Any:
    """A base with an adapter named `default`."""
    model = base()
    if kind == "peft":
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **settings))
    gl.attach(model, gl.LoraConfig(r=2, target_modules=["q_proj"], **settings))
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("kind", ["peft", "graft"])
def test_an_optimizer_that_holds_everything(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    found = note_training(model, tmp_path, sgd(model))
    assert (found.trainable, found.unknown, found.stale) == (4, 0, 0)
    assert found.active == found.optimised == ("default",) and not found.irregular
    assert read_state(tmp_path) == found


@pytest.mark.parametrize("kind", ["peft", "graft"])
def test_an_optimizer_of_another_copy(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    found = note_training(model, tmp_path, sgd(adapted(kind)))
    assert (found.unknown, found.stale, found.optimised) == (4, 4, ())
    assert all("lora_" in name for name in found.examples)


@pytest.mark.parametrize("kind", ["peft", "graft"])
def test_dropout_in_an_evaluation(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, lora_dropout=0.5)
    parts = [p for name, p in model.named_parameters() if "lora_B" in name]
    nn.init.normal_(parts[0])
    training = note_training(model, tmp_path, sgd(model))
    noisy = note_evaluation(model.train(), tmp_path, INPUTS)
    assert noisy.repeat_difference and noisy.unknown == training.unknown == 0
    quiet = note_evaluation(model.eval(), tmp_path, INPUTS)
    assert (quiet.dropouts, quiet.repeat_difference) == (0, 0.0)


def test_layers_that_differ(tmp_path: Path) -> None:
    model = adapted("peft")
    assert not note_evaluation(model, tmp_path).irregular
    next(module for module in model.modules() if hasattr(module, "merge")).merge()
    assert note_evaluation(model, tmp_path).irregular == ("merged_adapters",)


def test_a_damaged_note_is_refused(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    (tmp_path / STATE).write_text("[1]")
    with pytest.raises(FormatError, match="does not describe"):
        read_state(tmp_path)


def test_the_callback_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Arguments:
        output_dir = str(tmp_path)

    callback, model = DiagnosisCallback(), adapted("peft", lora_dropout=0.5)
    for _ in range(2):
        callback.on_train_begin(Arguments(), None, None, model=model, optimizer=sgd(base()))
    callback.on_prediction_step(Arguments(), None, None, model=model.train())
    said = capsys.readouterr().err
    assert said.count("D29") == 1 and said.count("D30") == 1
    model.eval()
    callback.on_prediction_step(Arguments(), None, None, model=model)  # looked at already
    assert (read_state(tmp_path) or pytest.fail()).dropouts
    callback.on_step_end(Arguments(), None, None)
    callback.on_prediction_step(Arguments(), None, None, model=model)
    assert (read_state(tmp_path) or pytest.fail()).dropouts == 0
