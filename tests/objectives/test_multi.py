"""The loss of several tasks: each batch reaches its own model alone, weighed, its figures under its name."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from graftlm.data.batches import Batch
from graftlm.models.siblings import Siblings
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.multi import MultiObjective, MultiSettings, Side, part_batch
from graftlm.training.optim import make_optimizer
from graftlm.training.step import optimizer_step
from graftlm.training.train_section import TrainSection


class Squares(Objective[Batch]):
    """The squares of what a layer gives, summed over rows."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        out: Tensor = model(batch.inputs["input_ids"].float())
        return LossParts(out.square().sum(), batch.target_tokens, {"size": float(out.detach().abs().mean())})

    def probe(self, length: int) -> Batch:
        return batch(length)


def batch(seed: int) -> Batch:
    ids = torch.arange(6).view(2, 3) + seed
    return Batch({"input_ids": ids}, torch.zeros(2, 3, dtype=torch.long), 2, 6, (1, 2))


@pytest.fixture
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"one": nn.Linear(3, 2), "other": nn.Linear(3, 5)}


def objective(models: dict[str, nn.Module], **weights: float) -> MultiObjective:
    return MultiObjective({n: Side(m, Squares(), weights.get(n, 1.0)) for n, m in models.items()})


def test_weight_and_names(models: dict[str, nn.Module]) -> None:
    alone = Squares()(models["other"], batch(1))
    found = objective(models, other=3.0)(Siblings(models), part_batch("other", batch(1)))
    assert torch.equal(found.loss_sum, 3.0 * alone.loss_sum)
    assert found.target_tokens == alone.target_tokens
    assert set(found.metrics) == {"other/size", "other/loss"}
    assert found.metrics["other/loss"] == pytest.approx(float(alone.loss_sum.detach()) / 2), (
        "without the weight"
    )


def test_inputs_that_were_moved_are_read(models: dict[str, nn.Module]) -> None:
    """The training step puts the inputs of the outer batch on the device."""
    moved = dataclasses.replace(part_batch("one", batch(1)), inputs={"input_ids": torch.zeros(2, 3)})
    found = objective(models)(Siblings(models), moved)
    wanted = 2 * models["one"].bias.square().sum()  # type: ignore[operator,union-attr]
    torch.testing.assert_close(found.loss_sum, wanted)


def test_a_step_of_one_task_moves_no_other(models: dict[str, nn.Module]) -> None:
    """Neither by gradients nor by momentum nor by weight decay, whatever came before."""
    together, settings = Siblings(models), TrainSection(weight_decay=0.5, learning_rate=0.1)
    named = dict(together.named_parameters())
    optimizer = make_optimizer(named, settings)
    loss = objective(models)
    for step, name in enumerate(("one", "other", "one", "one", "other")):
        before = copy.deepcopy(together.state_dict())
        done = optimizer_step(
            together, loss, [part_batch(name, batch(step))], named, optimizer,
            max_grad_norm=1.0, stop_asked=lambda: False,
        )  # fmt: skip
        assert done.outcome == "applied"
        for key, value in together.state_dict().items():
            assert torch.equal(value, before[key]) == (not key.startswith(f"@{name}.")), (step, key)


def test_power() -> None:
    tasks = {"a": {"task": "sft"}, "b": {"task": "sft"}}
    assert MultiSettings(tasks=tasks).power == 1.0
    assert MultiSettings(tasks=tasks, sampling="equal").power == 0.0
    assert MultiSettings(tasks=tasks, sampling="temperature", temperature=4.0).power == 0.25
