"""Layers in host memory, with a second set of buffers on the CPU in place of a GPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.methods.lora import LoraConfig
from graftlm.models.load import load_model
from graftlm.models.streaming.host import HostMover, stream_from_host
from graftlm.models.streaming.streamed import (
    Streaming,
    placement_of,
    streamed_layers,
    streamed_tensors,
    streaming_of,
)
from graftlm.quant.weights import WeightHandle
from graftlm.training.recompute import choose
from graftlm.training.train_section import TrainSection

from .bases import checkpoint, small
from .test_streamed import LORA, all_equal, logits, trained

CPU = torch.device("cpu")


def base(folder: Path, quantization: str) -> Any:
    return load_model(folder, dtype="float32", device="cpu", quantization=quantization)[0]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_is_equal_to_the_bit(kind: str, quantization: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", kind)
    resident = trained(base(folder, quantization), policy="everything", steps=4)
    model = base(folder, quantization)
    stream_from_host(model, CPU, kind)
    assert all_equal(trained(model, policy="everything", steps=4), resident)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_two_sets_of_buffers_serve_every_layer(layers: int) -> None:
    model = small("llama", num_hidden_layers=layers)
    expected = logits(model)
    stream_from_host(model, CPU, "llama")
    assert all(torch.equal(logits(model), expected) for _ in range(3))
    mover = mover_of(model)
    held = {id(slot) for slot in (*mover._slots.values(), *mover._free)}
    assert len(held) == 2


def mover_of(model: nn.Module) -> HostMover:
    streaming = streaming_of(model)
    assert streaming is not None and isinstance(streaming.mover, HostMover)
    return streaming.mover


def test_weights_are_in_the_host_memory_when_nothing_runs() -> None:
    model = small("llama", num_hidden_layers=4)
    layers = streamed_layers(model)
    before = [[tensor.clone() for tensor in streamed_tensors(layer)] for layer in layers]
    stream_from_host(model, CPU, "llama")
    stored = [[tensor.data_ptr() for tensor in streamed_tensors(layer)] for layer in layers]
    logits(model)
    streaming = streaming_of(model)
    assert streaming is not None
    streaming.release_all()
    for layer, values, places in zip(layers, before, stored, strict=True):
        assert all(map(torch.equal, streamed_tensors(layer), values))
        assert [tensor.data_ptr() for tensor in streamed_tensors(layer)] == places
    assert placement_of(model)[0] == "host" and "not measured" in placement_of(model)[1]


def test_a_backward_pass_that_recomputes_nothing_fails_instead_of_being_wrong() -> None:
    model = small("llama", num_hidden_layers=4)
    stream_from_host(model, CPU, "llama")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(model, LORA, policy="nothing", steps=1)


def test_the_policy_is_chosen_for_it() -> None:
    model = small("llama", num_hidden_layers=4)
    stream_from_host(model, CPU, "llama")

    def probe(tokens: int) -> Any:
        ids = torch.randint(4, 16, (1, tokens))
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    choice = choose(model, probe, TrainSection(), tokens=48)
    assert choice.policy == "everything" and "brought anew" in choice.why
    with pytest.raises(ConfigError, match=r"not possible with model\.placement: host"):
        choose(model, probe, TrainSection(recompute="nothing"), tokens=48)


def test_adapters_go_where_the_layer_computes() -> None:
    layer = nn.Linear(2, 2)
    vars(layer)["computes_on"] = torch.device("meta")
    assert WeightHandle(layer).device.type == "meta"


class Recorder:
    """Notes what it is told."""

    placement, why = "host", "a test"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.here: set[int] = set()

    def require_intact(self) -> None:
        self.calls.append("begin")

    def fetch(self, layer: int) -> None:
        self.here.add(layer)
        assert len(self.here) <= 2
        self.calls.append(f"fetch {layer}")

    def settle(self, layer: int) -> None:
        assert layer in self.here
        self.calls.append(f"use {layer}")

    def keep(self, layers: Any) -> None:
        self.here.intersection_update(layers)


def recorded(layers: int) -> tuple[Any, Recorder]:
    model, mover = small("llama", num_hidden_layers=layers), Recorder()
    Streaming(model, streamed_layers(model), mover)
    return model, mover


def test_the_order_of_a_step() -> None:
    model, mover = recorded(4)
    trained(model, LoraConfig(r=2), policy="nothing", steps=1)
    forward = ["begin", "fetch 0", "fetch 1", "use 0", "fetch 2", "use 1", "fetch 3", "use 2", "use 3"]
    backward = ["use 3", "fetch 1", "use 2", "fetch 0", "use 1", "use 0"]
    assert mover.calls == [*forward, *backward]


def test_the_order_of_passes_without_gradients() -> None:
    model, mover = recorded(3)
    logits(model)
    logits(model)
    once = ["fetch 1", "use 0", "fetch 2", "use 1", "fetch 0", "use 2"]
    assert mover.calls == ["begin", "fetch 0", *once, "begin", *once]


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_training_on_a_gpu(quantization: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", "llama")
    found = []
    for placement in ("resident", "host"):
        model, _ = load_model(
            folder, dtype="float32", device="cuda", quantization=quantization, placement=placement
        )
        found.append(trained(model, LoraConfig(r=4), policy="everything", steps=4))
    assert all_equal(*found)
