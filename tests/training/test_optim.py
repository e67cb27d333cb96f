"""The optimizer's groups and the schedules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig import Settings, make_model, trainable
from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.training.optim import SCHEDULES, learning_rate, make_optimizer, set_learning_rate


def settings(kind: str, warmup: float = 0.1, rate: float = 1.0) -> Any:
    return SimpleNamespace(learning_rate=rate, lr_scheduler_type=kind, warmup_ratio=warmup)


@given(st.sampled_from(SCHEDULES), st.integers(1, 500), st.floats(0.0, 0.99))
def test_rates_rise_then_fall_and_no_update_is_wasted(kind: str, total: int, warmup: float) -> None:
    rates = [learning_rate(step, total, settings(kind, warmup)) for step in range(total)]
    assert all(0.0 < rate <= 1.0 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_known_values() -> None:
    assert [learning_rate(s, 8, settings("cosine", 0.0)) for s in (0, 4)] == [1.0, pytest.approx(0.5)]
    assert [learning_rate(s, 10, settings("linear", 0.2)) for s in (0, 1, 2, 6)] == [
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        1.0,
        pytest.approx(0.5),
    ]
    assert {learning_rate(s, 10, settings("constant", 0.5)) for s in range(10)} == {1.0}
    assert learning_rate(9, 10, settings("constant_with_warmup", 0.5)) == 1.0
    assert learning_rate(50, 10, settings("linear")) == 0.0


def test_an_unknown_schedule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        learning_rate(0, 1, settings("cosin"))


def test_weight_decay_acts_on_matrices_only() -> None:
    parameters = trainable(make_model())
    optimizer = make_optimizer(parameters, Settings(weight_decay=0.1))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(parameters)
    assert all(decay[item] == (0.1 if item.ndim >= 2 else 0.0) for item in parameters.values())


@pytest.mark.parametrize("as_function", [True, False])
def test_loraplus_speeds_up_b_only(as_function: bool) -> None:
    parameters = trainable(make_model())
    names = [name for name in parameters if name.endswith(".lora_B")]
    b: Any = (lambda name: name in names) if as_function else names
    optimizer = make_optimizer(parameters, Settings(loraplus_lr_ratio=16.0), lora_b=b)
    set_learning_rate(optimizer, 1e-4)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, item in parameters.items():
        assert rate[item] == pytest.approx(16e-4 if name in names else 1e-4)


def test_loraplus_without_b_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trained parameter is a LoRA B"):
        make_optimizer(trainable(make_model()), Settings(loraplus_lr_ratio=16.0))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        make_optimizer({}, Settings())
    with pytest.raises(ConfigError, match="1 parameters to train are frozen"):
        make_optimizer({"a": nn.Parameter(torch.zeros(1), requires_grad=False)}, Settings())


def test_updates_are_adamw() -> None:
    """The fused kernel against the definition (Loshchilov and Hutter, arXiv:1711.05101), in float64."""
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    optimizer = make_optimizer({"w": weight}, Settings(weight_decay=0.1))
    expected, m, v = weight.detach().clone(), 0.0, 0.0
    for step in range(1, 5):
        rate = 0.01 * step
        weight.grad = torch.sin(weight.detach() * step)
        m, v = 0.9 * m + 0.1 * weight.grad, 0.999 * v + 0.001 * weight.grad**2
        corrected = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = expected * (1 - rate * 0.1) - rate * corrected
        set_learning_rate(optimizer, rate)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)
