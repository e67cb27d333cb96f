"""Feed-forward parts in tiles of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import Fusable, fusable, fused
from graftlm.models.recompute import tiles
from graftlm.models.recompute.kept import counted
from graftlm.models.recompute.policy import recomputing
from graftlm.testing.models import batch, tiny


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows from 32 on: 72 rows are four whole tiles and a rest."""
    monkeypatch.setattr(tiles, "ROWS", 16)
    monkeypatch.setattr(tiles, "FROM", 32)


def step(model: Any, policy: Any, kind: str = "llama") -> tuple[list[Tensor], int]:
    model.train()
    torch.manual_seed(0)
    found = fusable(model)
    return counted_step(model, found, policy, kind)


def counted_step(model: Any, found: Fusable, policy: Any, kind: str = "llama") -> tuple[list[Tensor], int]:
    with fused(found), recomputing(model, policy):
        with counted(model) as kept:
            loss = model(**batch(kind, rows=3, length=24), use_cache=False).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(loss, trained)), kept.total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "llama-nf4"])
def test_the_same_gradients_within_rounding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    attach(model, LoraConfig(r=4, init_lora_weights=False), storage=FOLDER)
    whole, kept = step(model, "everything", kind)
    monkeypatch.setattr(tiles, "ROWS", 16)
    monkeypatch.setattr(tiles, "FROM", 32)
    tiled, less = step(model, "everything", kind)
    for mine, its in zip(tiled, whole, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
    assert less < kept


def test_dropout_is_replayed(short: None) -> None:
    """Backward sees the masks of forward: the gradient is that of finite differences."""
    torch.manual_seed(0)
    model = tiny("llama", num_hidden_layers=1).double()
    attach(model, LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5, target_modules=["down_proj"]),
           storage=FOLDER)  # fmt: skip
    model.double().train()
    (_, b) = (parameter for parameter in model.parameters() if parameter.requires_grad)

    def loss() -> Tensor:
        torch.manual_seed(3)
        logits: Tensor = model(**batch("llama", rows=3, length=24), use_cache=False).logits
        return logits.square().sum()

    with recomputing(model, "everything"):
        (gradient,) = torch.autograd.grad(loss(), [b])
        direction, size = torch.randn_like(b), 1e-5
        b.data.add_(size * direction)
        above = loss().detach()
        b.data.sub_(2 * size * direction)
        below = loss().detach()
    # The norms compute in float32. Another mask changes the slope by more than a tenth.
    torch.testing.assert_close((above - below) / (2 * size), (gradient * direction).sum(), rtol=5e-3, atol=0)


def test_a_repeated_layer_stops_before_its_tiles(short: None) -> None:
    """Each tile is computed in forward and in backward, and not when the layer is repeated for its input."""
    model = tiny("llama")
    attach(model, LoraConfig(r=4), storage=FOLDER)
    rows: list[int] = []
    found = fusable(model)
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[-2]))
    model.train()
    counted_step(model, found, "everything")
    assert sum(rows) == 2 * 72 and max(rows) == 16
