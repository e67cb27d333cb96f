"""Nothing is kept, followed back or repeated below the first adapted layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.recompute.kept import counted
from graftlm.models.recompute.policy import Policy, recomputing
from graftlm.testing.models import batch, tiny

LAYERS = 6


def forward(adapted: list[int], policy: Policy, layers: int = LAYERS) -> tuple[Tensor, int]:
    """Loss and kept bytes of a model with adapters on these layers."""
    model: Any = tiny("llama", num_hidden_layers=layers)
    attach(model, LoraConfig(r=4, layers_to_transform=adapted), storage=FOLDER)
    model.train()
    with fused(fusable(model)), recomputing(model, policy), counted(model) as kept:
        loss = model(**batch("llama", rows=4, length=32), use_cache=False).loss
    return loss, kept.total


def nodes(loss: Tensor) -> int:
    """Of the graph that backward walks through."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [inner for inner, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("policy", ["nothing", "cheap", "feed_forward", "everything"])
def test_top_layers_alone_cost_what_a_model_of_those_layers_costs(policy: Policy) -> None:
    top, kept = forward([LAYERS - 2, LAYERS - 1], policy)
    alone, kept_alone = forward([0, 1], policy, layers=2)
    assert nodes(top) == nodes(alone)
    assert kept <= kept_alone * 1.01
    whole, kept_whole = forward(list(range(LAYERS)), policy)
    assert nodes(whole) > 2 * nodes(top)
    assert kept_whole > (2 if policy == "nothing" else 1.2) * kept


def test_the_embeddings_get_no_gradient() -> None:
    """Switching recomputation on must not ask for gradients of the embeddings, as `transformers` does."""
    model = tiny("llama", num_hidden_layers=3)
    attach(model, LoraConfig(r=4, layers_to_transform=[2]), storage=FOLDER)
    model.train()
    seen: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    with fused(fusable(model)), recomputing(model, "everything"):
        seen.clear()
        model(**batch("llama"), use_cache=False).loss.backward()
    assert not torch.tensor(seen[:3]).any()
