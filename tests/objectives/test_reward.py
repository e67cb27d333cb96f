"""The loss of a reward model against TRL's own code, and prompts computed once against prompts repeated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from graftlm.data.branches import Branched
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.ending import Ending
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.heads import with_head
from graftlm.models.load import load_model
from graftlm.objectives.reward import RewardObjective, RewardSettings, pair_losses, reward_batch

ENDING = Ending("rows", ("reward",), "number", seed=3)
ROWS = [
    Branched((5, 6, 7, 8, 9, 10, 11), ((12, 13), (14, 15, 16, 17)), row=1, truncated=False),
    Branched((20, 21), ((22,), (23, 24)), row=2, truncated=False),
    Branched((30, 31, 32, 33), ((34, 35, 36), (37,)), row=3, truncated=False),
]
MARGINS = [0.0, 0.5, 2.0]


def model_with_adapter(name: str | Path) -> tuple[Any, AdapterSet]:
    """A reward model with an adapter as if it had been trained: none of its parts is zero, none is large."""
    model, _ = load_model(name, dtype="float32", ending=ENDING)
    adapters = attach(model, with_head(LoraConfig(r=4), model), storage=FOLDER)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.normal_(0, 0.02, generator=draw)
    return model, adapters


@pytest.fixture(scope="module", params=["sprout", "gpt2-tiny-en"])
def base(request: pytest.FixtureRequest) -> Any:
    name = str(request.param)
    return name if name == "sprout" else request.getfixturevalue("shared") / "models" / name


@pytest.fixture(scope="module")
def adapted(base: Any) -> Iterator[tuple[Any, AdapterSet]]:
    yield model_with_adapter(base)


def by_trl(model: Any, rows: Sequence[Branched], margins: Sequence[float], center: float | None) -> Tensor:
    """The loss of `RewardTrainer` on these pairs: its collator and its `compute_loss`."""
    examples = [
        {"chosen_ids": [*row.prompt, *row.answers[0]], "rejected_ids": [*row.prompt, *row.answers[1]]}
        | {"margin": margin}
        for row, margin in zip(rows, margins, strict=True)
    ]
    inputs = DataCollatorForPreference(pad_token_id=model.config.pad_token_id)(examples)
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer: Any = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=accelerator,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    found: Tensor = RewardTrainer.compute_loss(trainer, model, inputs)
    return found


def gradients(adapters: AdapterSet, loss: Tensor) -> dict[str, Tensor]:
    named = adapters.named_parameters("default")
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("is_fused", [False, True], ids=["as loaded", "as trained"])
@pytest.mark.parametrize("center", [None, 0.01])
def test_loss_and_gradients_are_those_of_trl(
    adapted: tuple[Any, AdapterSet], center: float | None, is_fused: bool
) -> None:
    """Also with prompts computed once: the faster attention takes answers as documents of their own."""
    model, adapters = adapted
    objective = RewardObjective(model, RewardSettings(center_rewards_coefficient=center or 0.0))
    wanted = by_trl(model, ROWS, MARGINS, center)
    expected = gradients(adapters, wanted)
    with fused(fusable(model)) if is_fused else nullcontext():
        parts = objective(model, reward_batch(ROWS, MARGINS, pad=0))
        loss = parts.loss_sum / parts.target_tokens
        found = gradients(adapters, loss)
    assert parts.target_tokens == 3
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        away = float((found[name] - gradient).norm() / gradient.norm())
        assert away < 1e-5, name


def test_metrics(adapted: tuple[Any, AdapterSet]) -> None:
    model, _ = adapted
    objective = RewardObjective(model, RewardSettings())
    batch = reward_batch(ROWS, MARGINS, pad=0)
    with torch.no_grad():
        rewards = objective.rewards(model, batch).view(-1, 2)
        metrics = objective(model, batch).metrics
    chosen, rejected = rewards.unbind(1)
    assert metrics["rewards/accuracies"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert metrics["rewards/margins"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(float(chosen.mean()), abs=1e-6)


def test_formula_in_float64() -> None:
    """-log sigmoid(chosen - rejected - margin) + c (chosen + rejected)^2."""
    rewards = torch.tensor([[2.0, -1.0], [0.5, 0.75], [-30.0, 30.0]], dtype=torch.float64)
    margins = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    difference = rewards[:, 0] - rewards[:, 1] - margins
    wanted = torch.log1p(torch.exp(-difference)) + 0.25 * (rewards[:, 0] + rewards[:, 1]) ** 2
    torch.testing.assert_close(pair_losses(rewards, margins, 0.25), wanted, rtol=1e-12, atol=0)


def test_one_large_batch_is_many_small_ones(adapted: tuple[Any, AdapterSet]) -> None:
    model, _ = adapted
    objective = RewardObjective(model, RewardSettings(center_rewards_coefficient=0.1))
    with torch.no_grad():
        whole = objective(model, reward_batch(ROWS, MARGINS, pad=0)).loss_sum
        each = [
            objective(model, reward_batch([row], [margin], pad=0)).loss_sum
            for row, margin in zip(ROWS, MARGINS, strict=True)
        ]
    torch.testing.assert_close(whole, torch.stack(each).sum(), rtol=1e-5, atol=1e-6)


def test_an_empty_answer_is_refused(adapted: tuple[Any, AdapterSet]) -> None:
    model, _ = adapted
    row = Branched((5, 6), ((), (7,)), row=1, truncated=False)
    with pytest.raises(ValueError, match="empty answer"):
        RewardObjective(model, RewardSettings())(model, reward_batch([row], [0.0], pad=0))
