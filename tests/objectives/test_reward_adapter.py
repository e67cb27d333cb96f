"""A reward adapter beside a policy says what the reward model says, and leaves the policy as it was."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.core.errors import FormatError
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.models.ending import Ending
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.heads import with_head
from graftlm.models.load import load_model
from graftlm.objectives.reward_adapter import RewardAdapter

ENDING = Ending("rows", ("reward",), "number", seed=3)
ROWS = [[5, 6, 7, 8, 9], [20, 21], list(range(30, 52)), [4]]


def config(method: str) -> Any:
    return IA3Config() if method == "ia3" else LoraConfig(r=1)


def moved(adapters: AdapterSet, name: str = "default") -> AdapterSet:
    """The adapter as if it had been trained a little."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.02, generator=draw))
    return adapters


@pytest.fixture(params=["lora", "ia3"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[float]]:
    """A reward adapter on disk, and what its model says."""
    model, _ = load_model("sprout", dtype="float32", ending=ENDING)
    adapters = moved(attach(model, with_head(config(request.param), model), storage=FOLDER))
    adapters.save(tmp_path / "reward")
    with torch.no_grad():
        said = [float(model(input_ids=torch.tensor([row])).logits) for row in ROWS]
    return tmp_path / "reward", said


def policy() -> tuple[Any, AdapterSet]:
    model, _ = load_model("sprout", dtype="float32")
    return model, moved(attach(model, LoraConfig(r=2), storage=FOLDER))


@pytest.mark.parametrize("is_fused", [False, True], ids=["as loaded", "as trained"])
def test_says_what_the_reward_model_says(saved: tuple[Path, list[float]], is_fused: bool) -> None:
    folder, said = saved
    model, adapters = policy()
    reward = RewardAdapter(adapters, folder)
    with fused(fusable(model)) if is_fused else nullcontext():
        found = reward(ROWS)
    assert found == pytest.approx(said, abs=2e-5)


def test_the_policy_stays_as_it_was(saved: tuple[Path, list[float]]) -> None:
    model, adapters = policy()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    model.train()
    reward = RewardAdapter(adapters, saved[0])
    random = torch.get_rng_state()
    reward(ROWS)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert adapters.active == ("default",) and adapters.trainable == ("default",)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    _, adapters = policy()
    adapters.save(tmp_path / "text")
    with pytest.raises(FormatError, match="no adapter of a reward model"):
        RewardAdapter(adapters, tmp_path / "text")
    assert adapters.names == ("default",)


def test_a_reward_of_another_base_is_refused(saved: tuple[Path, list[float]]) -> None:
    model, adapters = policy()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.5)
    with pytest.raises(FormatError, match="trained on another base"):
        RewardAdapter(adapters, saved[0])
    assert adapters.names == ("default",)


def test_no_row_without_a_token(saved: tuple[Path, list[float]]) -> None:
    _, adapters = policy()
    with pytest.raises(ValueError, match="without a token"):
        RewardAdapter(adapters, saved[0])([[1], []])
