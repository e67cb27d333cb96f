"""The end of a model for labelled rows only gives what all rows give there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.fusing.fused import Fusable, fusable, fused
from graftlm.models.fusing.last_rows import last_layer, only
from graftlm.models.recompute.policy import Policy, recomputing
from graftlm.objectives.sft import SftObjective
from graftlm.testing.models import tiny

METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(r=4, init_lora_weights=False),
    "bottleneck": BottleneckConfig(),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
}


def answers(packing: bool, share: float = 0.3) -> Any:
    """Rows of 20 to 30 tokens whose last tokens are labelled."""
    torch.manual_seed(4)
    rows = []
    for number, length in enumerate((20, 27, 30, 22)):
        ids = torch.randint(3, 40, (length,)).tolist()
        asked = round(length * (1 - share))
        rows.append(Encoded(tuple(ids), (-100,) * asked + tuple(ids[asked:]), number, False))
    return Batches(rows, rows_per_batch=4, max_length=64, packing=packing, seed=0, pad_token_id=0).batch(0, 0)


def step(model: Any, objective: SftObjective, batch: Any, parts: Any, policy: Policy = "nothing") -> Any:
    model.train()
    with fused(parts), recomputing(model, policy):
        loss = objective(model, batch).loss_sum
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return loss.detach(), torch.autograd.grad(loss, trained)


def without(parts: Fusable) -> Fusable:
    """All parts but the one in question."""
    return Fusable(tuple(part for part in parts.parts if "last layers" not in part.summary))


@pytest.mark.parametrize("kind, method", [
    *(("llama", name) for name in METHODS), ("llama-nf4", "lora"), ("gemma3", "lora"), ("gpt2", "lora"),
])  # fmt: skip
@pytest.mark.parametrize("packing", [True, False])
def test_the_same_loss_and_gradients(kind: str, method: str, packing: bool) -> None:
    model = tiny(kind)
    attach(model, METHODS[method], storage=FOLDER)
    objective, parts, batch = SftObjective(model), fusable(model), answers(packing)
    expected, gradients = step(model, objective, batch, without(parts))
    loss, found = step(model, objective, batch, parts)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, its in zip(found, gradients, strict=True):
        assert (mine - its).norm() <= 1e-4 * its.norm() + 1e-6


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_only_labelled_rows_reach_the_last_feed_forward_part(kind: str) -> None:
    model = tiny(kind)
    attach(model, LoraConfig(r=4), storage=FOLDER)
    objective, parts, batch = SftObjective(model), fusable(model), answers(packing=True)
    assert "1 of 1 last layers for rows with a label" in parts.summary
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: seen.append(out.shape[:-1].numel()))
    step(model, objective, batch, parts)
    assert seen[-1] == batch.target_tokens < seen[0]


def test_many_rows_reach_it_in_whole_steps() -> None:
    """So that products of few shapes have to be prepared; rows that fill up change no gradient."""
    model = tiny("llama")
    attach(model, LoraConfig(r=4, init_lora_weights=False), storage=FOLDER)
    ids, rows = torch.arange(480).view(8, 60) % 40, torch.arange(480).view(8, 60) % 4 != 0
    seen: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = model.model(input_ids=ids, use_cache=False)[0][rows]
    with last_layer(model).in_use(), only(rows) as wanted:
        found = model.model(input_ids=ids, use_cache=False)[0]
    assert wanted.taken and found.shape == (1, 360, *expected.shape[1:]) and seen[-1] == 384
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    for mine, its in zip(
        torch.autograd.grad(found.square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
        strict=True,
    ):
        assert (mine - its).norm() <= 1e-4 * its.norm() + 1e-6


@pytest.mark.parametrize("policy", ["cheap", "feed_forward", "everything"])
def test_with_recomputation(policy: Policy) -> None:
    model = tiny("llama", num_hidden_layers=3)
    attach(model, LoraConfig(r=4, init_lora_weights=False), storage=FOLDER)
    objective, parts, batch = SftObjective(model), fusable(model), answers(packing=True)
    expected, gradients = step(model, objective, batch, parts)
    loss, found = step(model, objective, batch, parts, policy)
    assert torch.equal(loss, expected)
    assert all(torch.equal(*pair) for pair in zip(found, gradients, strict=True))


def test_all_rows_where_nobody_says_which() -> None:
    model = tiny("llama")
    ids = torch.arange(3, 13).view(2, 5)
    expected: Tensor = model.model(input_ids=ids, use_cache=False)[0]
    with last_layer(model).in_use():
        assert torch.equal(model.model(input_ids=ids, use_cache=False)[0], expected)
        rows = torch.zeros(2, 4, dtype=torch.bool)  # of another batch
        with only(rows) as wanted:
            assert torch.equal(model.model(input_ids=ids, use_cache=False)[0], expected)
        assert not wanted.taken


@pytest.mark.parametrize(
    "kind, why", [("gpt2", "called in another way"), ("t5", "no decoder"), ("bert", "another structure")]
)
def test_other_structures_are_left_alone(kind: str, why: str) -> None:
    assert last_layer(tiny(kind)).summary == f"0 of 1 last layers ({why})"


def test_an_adapter_around_the_layer() -> None:
    model = tiny("llama")
    attach(model, BottleneckConfig(target_modules=["1"]), storage=FOLDER)
    assert last_layer(model).summary == "0 of 1 last layers (an adapter lies around it)"
