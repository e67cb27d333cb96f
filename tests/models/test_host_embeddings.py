"""Input embeddings in the machine's memory. The GPU is one without data: torch refuses to mix devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import graftlm.models.load as loading
from graftlm.core.errors import ConfigError, ModelError
from graftlm.methods.base import MethodConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.attach import attach_from_base
from graftlm.models.load import load_model
from graftlm.models.streaming.embedding import check_embeddings, keep_embeddings_on_host
from graftlm.quant.embedding import quantise_embeddings
from graftlm.quant.facts import device_of

from .bases import checkpoint, small, tokenizer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
IDS = torch.arange(4, 16).view(2, 6)


def untied(kind: str = "llama") -> Any:
    return small(kind, tie_word_embeddings=False)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "int8"])
def test_values_are_the_same(is_packed: bool) -> None:
    model = untied()
    if is_packed:
        quantise_embeddings(model)
    expected = logits(model)
    keep_embeddings_on_host(model, CPU)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules="all-linear"),
        LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        IA3Config(),
        PromptTuningConfig(num_virtual_tokens=3),
    ],
    ids=["lora", "lora on the embeddings", "ia3", "prompt"],
)
def test_adapters_train_to_the_same_bits(config: MethodConfig) -> None:
    def trained(on_host: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = untied()
        if on_host:
            keep_embeddings_on_host(model, CPU)
        parameters = list(attach_from_base(model, config, "default").parameters("default"))
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in parameters]

    pairs = zip(trained(True), trained(False), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def on_device(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Every tensor that a module holds becomes one without data on `device`."""

    def fake(tensor: Tensor) -> Tensor:
        found: Tensor = FakeTensor(mode, tensor.to("meta"), device)
        return found

    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None:
                module._parameters[name] = nn.Parameter(fake(held.detach()), held.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_tensor_of_one_device_meets_one_of_the_other(kind: str) -> None:
    mode = FakeTensorMode()
    ids: Tensor = FakeTensor(mode, IDS.to("meta"), GPU)

    def split(model: Any) -> Any:
        on_device(model, mode, GPU)
        on_device(model.get_input_embeddings(), mode, CPU)
        return model

    model = split(untied(kind))
    with mode, torch.no_grad(), pytest.raises(RuntimeError, match="devices"):
        first_feed_forward(model)(model.get_input_embeddings()(ids))
    model = split(kept_without_pinning(untied(kind)))
    with mode, torch.no_grad():
        assert first_feed_forward(model)(model.get_input_embeddings()(ids)).device == GPU
    assert device_of(model) == GPU  # though its first tensor is in the machine's memory
    assert device_of(model.get_input_embeddings()) == GPU


def first_feed_forward(model: Any) -> nn.Module:
    return next(module for path, module in model.named_modules() if path.endswith(".mlp"))


def kept_without_pinning(model: Any) -> Any:
    """As for a GPU, but for memory that only a GPU's driver gives."""
    keep_embeddings_on_host(model, CPU)
    table = model.get_input_embeddings()
    vars(table)["computes_on"] = GPU
    table._forward_hooks.clear()
    table.register_forward_hook(lambda module, args, rows: rows.to(GPU))
    return model


def test_a_head_that_shares_the_table_is_refused() -> None:
    tied = small("llama", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="output head"):
        keep_embeddings_on_host(tied, CPU)
    quantise_embeddings(tied)
    with pytest.raises(ModelError, match="output head"):
        keep_embeddings_on_host(tied, CPU)
    assert logits(tied).isfinite().all()


def test_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "base", "llama")
    tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match="device is the CPU"):
        load_model(folder, device="cpu", embeddings="host")
    with pytest.raises(ConfigError, match="did you mean"):
        check_embeddings("hots", GPU)
    monkeypatch.setattr(loading, "check_embeddings", lambda embeddings, device: None)
    model, _ = load_model(folder, device="cpu", embeddings="host")
    assert model.get_input_embeddings().computes_on == CPU
