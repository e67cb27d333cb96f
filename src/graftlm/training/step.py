"""One optimizer step over a window of micro-batches, exact in its loss and safe in its update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.core.errors import TrainingError
from graftlm.training.interfaces import B, Batch, EnterPhase, Objective, StopAsked, not_measured
from graftlm.training.out_of_memory import memory_errors

Outcome = Literal["applied", "no_targets", "non_finite", "stopped"]


@dataclass(frozen=True)
class StepStats:
    """What one window did. Unless `outcome` is "applied", no parameter was changed.

    `loss` is the mean over the target tokens of the whole window, `grad_norm` the norm before clipping.
    `rows` are the window's data rows; when it was not finite, those of the guilty micro-batches.
    `parameters` names those without a gradient, or with a non-finite one.
    """

    outcome: Outcome
    loss: float
    grad_norm: float
    target_tokens: int
    real_tokens: int
    rows: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def optimizer_step(
    model: nn.Module,
    objective: Objective[B],
    window: Sequence[B],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float | None,
    stop_asked: StopAsked,
    enter: EnterPhase = not_measured,
) -> StepStats:
    """Forward and backward over `window`, then one update if loss and gradients are finite.

    The loss is the sum over target tokens divided by the target tokens of the whole window, so unequal
    lengths weigh as in one large batch; the count is known before the first backward, so only one
    micro-batch is in memory at a time. The host waits for the device once, at the end. `enter` is told where
    "forward", "backward" and "update" begin.

    Raises:
        TrainingError: no gradient reaches any parameter, or the device is out of memory.
    """
    planned = sum(batch.target_tokens for batch in window)
    real = sum(batch.real_tokens for batch in window)
    rows = tuple(row for batch in window for row in batch.rows)
    if planned == 0:
        return StepStats("no_targets", math.nan, math.nan, 0, real, rows)
    optimizer.zero_grad(set_to_none=True)
    useful = [batch for batch in window if batch.target_tokens]
    try:
        done = _accumulate(model, objective, useful, parameters, planned, stop_asked, enter)
        if done is None:
            return StepStats("stopped", math.nan, math.nan, 0, 0, rows)
        enter("update")
        return updated(window, done, parameters, optimizer, max_grad_norm=max_grad_norm)
    finally:
        optimizer.zero_grad(set_to_none=True)


def updated(
    window: Sequence[Batch],
    done: Sequence[Done],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float | None,
) -> StepStats:
    """One update, if loss and gradients are finite. `done` are the losses of those batches of the `window`
    that have targets; gradients are those of their sum over the targets of the whole window.

    Raises:
        TrainingError: no gradient reaches any parameter.
    """
    useful = [batch for batch in window if batch.target_tokens]
    planned = sum(batch.target_tokens for batch in useful)
    real = sum(batch.real_tokens for batch in window)
    rows = tuple(row for batch in window for row in batch.rows)
    counted = sum(parts.target_tokens for parts in done)
    if counted == 0:
        return StepStats("no_targets", math.nan, math.nan, 0, real, rows)
    gradients = _gradients(parameters, planned / counted)
    sums, norm = _to_host(done, gradients)
    loss = math.fsum(sums) / counted if all(map(math.isfinite, sums)) else math.nan
    if not (math.isfinite(loss) and math.isfinite(norm)):
        guilty = [batch for batch, value in zip(useful, sums, strict=True) if not math.isfinite(value)]
        rows = tuple(row for batch in guilty or useful for row in batch.rows)
        return StepStats("non_finite", loss, norm, counted, real, rows, _non_finite(gradients))
    _clip(list(gradients.values()), norm, max_grad_norm)
    optimizer.step()
    without = tuple(name for name in parameters if name not in gradients)
    return StepStats("applied", loss, norm, counted, real, rows, without, _mean(done))


def _accumulate(
    model: nn.Module,
    objective: Objective[B],
    window: Sequence[B],
    parameters: Mapping[str, nn.Parameter],
    planned: int,
    stop_asked: StopAsked,
    enter: EnterPhase,
) -> list[Done] | None:
    """Gradients of (loss sum / planned) over the window; None if asked to stop on the way."""
    device = next(iter(parameters.values())).device
    done = []
    with memory_errors(device):
        for batch in window:
            if stop_asked():
                return None
            enter("forward")
            parts = objective(model, to_device(batch, device))
            enter("backward")
            if parts.target_tokens:
                (parts.loss_sum / planned).backward()
            done.append(Done(parts.loss_sum.detach(), parts.target_tokens, parts.metrics))
    return None if stop_asked() else done


@dataclass(frozen=True)
class Done:
    """`LossParts` without its graph."""

    loss_sum: Tensor
    target_tokens: int
    metrics: Mapping[str, float]


def to_device(batch: B, device: torch.device) -> B:
    """The batch with its inputs on `device`; copies to a GPU do not make the host wait.

    Labels stay on the host: which rows count is read off them there, without asking the device.
    """
    if device.type == "cpu":
        return batch

    def move(tensor: Tensor) -> Tensor:
        source = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
        return source.to(device, non_blocking=True)

    inputs = {name: move(tensor) for name, tensor in batch.inputs.items()}
    return dataclasses.replace(batch, inputs=inputs)


def _gradients(parameters: Mapping[str, nn.Parameter], scale: float) -> dict[str, Tensor]:
    gradients = {name: item.grad for name, item in parameters.items() if item.grad is not None}
    if not gradients:
        raise TrainingError(
            f"No gradient reaches any of the {len(parameters)} trainable parameters.",
            meaning="The trained parameters do not take part in the model's forward pass.",
            fix="Activate the adapter that is trained; check that nothing wraps the model in no_grad.",
        )
    if scale != 1.0:  # the objective counted its targets by another rule than the batch
        torch._foreach_mul_(list(gradients.values()), scale)
    return gradients


def _to_host(done: Sequence[Done], gradients: Mapping[str, Tensor]) -> tuple[list[float], float]:
    """Loss sums and gradient norm as numbers: the one place where the host waits for the device."""
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    norm = norm.to(torch.promote_types(norm.dtype, torch.float32))
    *sums, value = torch.stack([*(parts.loss_sum.to(norm) for parts in done), norm]).tolist()
    return sums, value


def _clip(gradients: list[Tensor], norm: float, limit: float | None) -> None:
    if limit and norm > limit:
        torch._foreach_mul_(gradients, limit / norm)


def _non_finite(gradients: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name, grad in gradients.items() if not bool(torch.isfinite(grad).all()))


def _mean(done: Sequence[Done]) -> dict[str, float]:
    """Metrics averaged over the window by target tokens."""
    names = dict.fromkeys(name for parts in done for name in parts.metrics)
    return {name: _weighted([parts for parts in done if name in parts.metrics], name) for name in names}


def _weighted(done: Sequence[Done], name: str) -> float:
    weight = sum(parts.target_tokens for parts in done)
    return sum(parts.metrics[name] * parts.target_tokens for parts in done) / max(1, weight)
