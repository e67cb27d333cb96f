"""One optimizer step: exact over unequal micro-batches, and never an update that is not finite."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from rig import Parts, RowBatch, Settings, collate, make_model, make_rows, objective, trainable

from graftlm.core.errors import TrainingError
from graftlm.training.optim import make_optimizer
from graftlm.training.step import StepStats, optimizer_step

ROWS = make_rows(8, seed=5)


def step(
    model: Any, window: list[RowBatch], loss: Any = objective, limit: float | None = None, rate: float = 0.0
) -> tuple[StepStats, dict[str, torch.Tensor]]:
    """One step; with the gradients the optimizer saw (empty if it was not called)."""
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, Settings(learning_rate=rate, weight_decay=0.0))
    seen: dict[str, torch.Tensor] = {}

    def remember(*_: Any) -> None:
        seen.update({name: item.grad.clone() for name, item in parameters.items() if item.grad is not None})

    optimizer.register_step_pre_hook(remember)
    stats = optimizer_step(
        model, loss, window, parameters, optimizer, max_grad_norm=limit, stop_asked=lambda: False
    )
    assert all(item.grad is None for item in parameters.values())
    return stats, seen


def reference(model: Any, rows: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean over all target tokens of all rows, each row alone: no padding, no batching, float64."""
    parts = [objective(model, collate(ROWS, [row])) for row in rows]
    loss = sum(part.loss_sum for part in parts) / sum(part.target_tokens for part in parts)
    parameters = trainable(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("cut", [[8], [4, 4], [1, 2, 5], [1] * 8])
def test_accumulation_equals_one_batch(cut: list[int]) -> None:
    model = make_model(dropout=0.0, dtype=torch.float64)
    window, first = [], 0
    for size in cut:
        window.append(collate(ROWS, list(range(first, first + size))))
        first += size
    loss, gradients = reference(model, list(range(8)))
    stats, seen = step(model, window)
    assert stats.outcome == "applied" and stats.rows == tuple(range(1, 9))
    assert stats.loss == pytest.approx(loss, rel=1e-12)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in gradients.values()))
    assert stats.grad_norm == pytest.approx(norm, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-10, atol=1e-14)


def test_the_mean_of_micro_batch_means_would_be_wrong() -> None:
    """Guards the test above: its rows are unequal enough to tell the two definitions apart."""
    model = make_model(dropout=0.0, dtype=torch.float64)
    means = [
        float(p.loss_sum.detach()) / p.target_tokens
        for p in (objective(model, collate(ROWS, [r])) for r in range(8))
    ]
    assert abs(sum(means) / 8 - reference(model, list(range(8)))[0]) > 1e-3


def test_an_objective_with_its_own_count_is_still_averaged_right() -> None:
    model = make_model(dropout=0.0, dtype=torch.float64)

    def halved(model: Any, batch: RowBatch) -> Parts:
        parts = objective(model, batch)
        return Parts(parts.loss_sum, 2 * parts.target_tokens)

    plain, gradients = step(model, [collate(ROWS, [0, 1]), collate(ROWS, [2])])
    other, seen = step(model, [collate(ROWS, [0, 1]), collate(ROWS, [2])], halved)
    assert other.loss == pytest.approx(plain.loss / 2, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen[name], gradient / 2)


def test_clipping_scales_to_the_limit() -> None:
    model = make_model(dropout=0.0, dtype=torch.float64)
    stats, seen = step(model, [collate(ROWS, [0, 1])], limit=1e-3)
    assert stats.grad_norm > 1e-3
    assert float(torch.nn.utils.get_total_norm(list(seen.values()))) == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_is_not_applied_and_its_rows_are_named(bad: float) -> None:
    model = make_model()
    before = {name: item.detach().clone() for name, item in trainable(model).items()}

    def broken(model: Any, batch: RowBatch) -> Parts:
        parts = objective(model, batch)
        return Parts(parts.loss_sum * bad, parts.target_tokens) if 3 in batch.rows else parts

    stats, seen = step(model, [collate(ROWS, [0, 1]), collate(ROWS, [2, 3])], broken, rate=0.1)
    assert stats.outcome == "non_finite" and stats.rows == (3, 4) and not seen
    assert all(torch.equal(item, before[name]) for name, item in trainable(model).items())


def test_an_infinite_gradient_under_a_finite_loss_is_not_applied_and_named() -> None:
    model = make_model()
    name = next(iter(trainable(model)))
    before = {key: item.detach().clone() for key, item in trainable(model).items()}
    handle = trainable(model)[name].register_hook(lambda grad: grad * math.inf)
    stats, seen = step(model, [collate(ROWS, [0, 1])], rate=0.1)
    handle.remove()
    assert stats.outcome == "non_finite" and math.isfinite(stats.loss)
    assert stats.parameters == (name,) and not seen
    assert all(torch.equal(item, before[key]) for key, item in trainable(model).items())


def test_a_window_without_targets_is_skipped() -> None:
    empty = collate(ROWS, [0, 1])
    empty = dataclasses.replace(empty, labels=torch.full_like(empty.labels, -100), target_tokens=0)
    stats, seen = step(make_model(), [empty, empty])
    assert stats.outcome == "no_targets" and not seen
    # Beside a batch that has some, it changes nothing.
    model = make_model(dropout=0.0)
    alone, _ = step(model, [collate(ROWS, [2, 3])])
    beside, _ = step(model, [empty, collate(ROWS, [2, 3])])
    assert (alone.loss, alone.grad_norm) == (beside.loss, beside.grad_norm)


def test_parameters_out_of_the_graph_are_named() -> None:
    model = make_model()
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
    assert step(model, [collate(ROWS, [0])])[0].parameters == ("unused",)
    lonely = torch.nn.ParameterDict({"unused": torch.nn.Parameter(torch.zeros(2))})

    def constant(model: Any, batch: RowBatch) -> Parts:
        return Parts(torch.ones((), requires_grad=True) * 3.0, 1)

    with pytest.raises(TrainingError, match="No gradient"):
        step(lonely, [collate(ROWS, [0])], constant)


def test_out_of_memory_says_what_to_change() -> None:
    def full(model: Any, batch: RowBatch) -> Parts:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(TrainingError, match="per_device_train_batch_size"):
        step(make_model(), [collate(ROWS, [0])], full)


def test_a_stop_between_micro_batches_leaves_nothing() -> None:
    model = make_model()
    parameters = trainable(model)
    before = {name: item.detach().clone() for name, item in parameters.items()}
    answers = iter([False, True])
    stats = optimizer_step(
        model,
        objective,
        [collate(ROWS, [0]), collate(ROWS, [1])],
        parameters,
        make_optimizer(parameters, Settings()),
        max_grad_norm=1.0,
        stop_asked=lambda: next(answers),
    )
    assert stats.outcome == "stopped"
    assert all(item.grad is None and torch.equal(item, before[name]) for name, item in parameters.items())
