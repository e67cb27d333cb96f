"""Every policy gives the gradients of keeping everything, and keeps less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.recompute.kept import counted
from graftlm.models.recompute.places import places_of
from graftlm.models.recompute.policy import POLICIES, Policy, obstacle, recomputing
from graftlm.testing.models import batch, tiny

METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.2),
    "dora": LoraConfig(r=4, init_lora_weights=False, use_dora=True),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
}
ON_CPU = [policy for policy in POLICIES if policy != "offload"]


def step(model: Any, kind: str) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients and bytes kept of one step with the same random numbers."""
    torch.manual_seed(1)
    model.train()
    with counted(model) as kept:
        loss = model(**batch(kind, rows=4, length=24), use_cache=False).loss
    total = kept.total
    del kept
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained)), total


def adapted(kind: str, method: str) -> Any:
    layers = {"gpt2": "n_layer"}.get(kind, "num_hidden_layers")
    model = tiny(kind, **({layers: 4} if kind != "gemma3" else {}))
    torch.manual_seed(2)
    attach(model, METHODS[method], storage=FOLDER)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "kind, method",
    [("llama", name) for name in METHODS] + [("llama-nf4", "lora"), ("gpt2", "lora"), ("gemma3", "lora")],
)
def test_gradients_are_equal_to_the_bit(kind: str, method: str) -> None:
    model = adapted(kind, method)
    with fused(fusable(model)):
        loss, gradients, _ = step(model, kind)
        for policy in ON_CPU:
            with recomputing(model, policy):
                same_loss, others, _ = step(model, kind)
            assert torch.equal(same_loss, loss), policy
            assert all(torch.equal(*pair) for pair in zip(others, gradients, strict=True)), policy


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_policy_keeps_less(kind: str) -> None:
    model = adapted(kind, "lora")
    kept: dict[Policy, int] = {}
    with fused(fusable(model)):
        for policy in ON_CPU:
            with recomputing(model, policy):
                kept[policy] = step(model, kind)[2]
    assert kept["nothing"] >= kept["cheap"] > kept["feed_forward"] > kept["everything"]


def test_the_model_is_as_before_afterwards() -> None:
    model = adapted("llama", "lora")
    before = [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    for policy in ON_CPU:
        with pytest.raises(KeyError), fused(fusable(model)), recomputing(model, policy):
            raise KeyError
    after = [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]
    assert [set(each) for each in after] == [set(each) for each in before]
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_nothing_is_recomputed_in_evaluation() -> None:
    model = adapted("llama", "lora")
    for policy in ON_CPU:
        with recomputing(model, policy):
            model.eval()
            with counted(model) as kept:
                loss = model(**batch("llama"), use_cache=False).loss
            assert kept.total and loss.requires_grad


def test_the_last_product_of_a_feed_forward_part_is_not_repeated() -> None:
    model = adapted("llama", "lora")
    calls: list[str] = []
    found = fusable(model)
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        mlp.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with fused(found), recomputing(model, "feed_forward"):
        step(model, "llama")
    assert calls.count("down_proj") == 1
    assert {calls.count(name) for name in ("gate_proj", "up_proj")} <= {0, 2}  # 0: called in another way


def test_only_layers_that_a_gradient_passes_are_repeated() -> None:
    """Neither those below the first adapted layer nor the last one."""
    model = tiny("llama", num_hidden_layers=5)
    attach(model, LoraConfig(r=4, layers_to_transform=[2, 3, 4]), storage=FOLDER)
    calls = [0] * 5
    for number, layer in enumerate(model.model.layers):

        def count(*_: object, number: int = number) -> None:
            calls[number] += 1

        layer.self_attn.register_forward_pre_hook(count)
    with recomputing(model, "everything"):
        step(model, "llama")
    assert calls == [1, 1, 2, 2, 1]


def test_what_is_not_possible_is_refused_with_the_reason() -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match=r"offload is not possible.*in host memory already"):
        recomputing(model, "offload").__enter__()
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert obstacle(plain, "feed_forward") and obstacle(plain, "everything")
    assert obstacle(plain, "nothing") is None


def test_places_are_found_with_adapters_in_them() -> None:
    for method in METHODS:
        model = adapted("llama", method)
        places = places_of(model)
        assert len(places.layers) == len(places.feed_forwards) == 4
        assert all(part.end in part.module.children() for part in places.feed_forwards)


@pytest.mark.gpu
def test_offloaded_inputs_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.models.recompute.offload.LEAST", 0)
    model = adapted("llama", "lora").to("cuda")
    inputs = {name: value.to("cuda") for name, value in batch("llama", rows=4, length=24).items()}
    found = []
    for policy in ("nothing", "offload", "offload"):
        with fused(fusable(model)), recomputing(model, policy):
            torch.manual_seed(1)
            model.train()
            loss = model(**inputs, use_cache=False).loss
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            found.append(torch.autograd.grad(loss, trained))
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(others, found[0], strict=True))
