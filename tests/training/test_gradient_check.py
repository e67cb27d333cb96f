"""A trained parameter without a gradient is found in the first step, and refused or said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import RowBatches, Settings, make_model, make_rows, objective, trainable
from torch import nn

from graftlm.core.errors import TrainingError
from graftlm.core.events import read_events
from graftlm.training.checkpoint import published
from graftlm.training.loop import train


class Detached(nn.Module):
    """A layer that forgets where its input came from, as one in packed weights without autograd would."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.layer(x)
        return found


def started(model: Any, run: Path) -> Callable[[], Any]:
    batches = RowBatches(make_rows(7))
    settings: Any = Settings(max_steps=3, save_steps=None)
    return lambda: train(model, objective, batches, trainable(model), settings, run=run)


def test_a_layer_that_ran_and_does_not_learn_is_refused(tmp_path: Path) -> None:
    model: Any = make_model()
    last = model.model.layers[1].self_attn
    last.o_proj = Detached(last.o_proj)
    with pytest.raises(TrainingError, match="5 of 14 trained parameters got no gradient") as refused:
        started(model, tmp_path)()
    assert all("layers.1." in name for name in refused.value.problems)
    assert not published(tmp_path), "nothing of such a run is kept"
    assert read_events(tmp_path / "events.jsonl")[-1]["why"] == "failed"


def test_a_layer_that_did_not_run_is_said(tmp_path: Path) -> None:
    model: Any = make_model()
    model.model.idle = nn.Linear(4, 4)
    assert started(model, tmp_path)().why == "finished"
    notices = [e["text"] for e in read_events(tmp_path / "events.jsonl") if e["kind"] == "notice"]
    assert notices == [
        "2 of 16 trained parameters got no gradient in the first step, as their layers did not run: "
        "model.idle.weight, model.idle.bias."
    ]


def test_nothing_is_watched_after_the_first_step(tmp_path: Path) -> None:
    model: Any = make_model()
    started(model, tmp_path)()
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(e["kind"] == "notice" for e in read_events(tmp_path / "events.jsonl"))
