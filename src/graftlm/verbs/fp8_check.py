"""The gate of FP8 products: loss and gradients of the first batch must agree with those in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import TrainingError
from graftlm.core.seeding import capture_rng, restore_rng
from graftlm.data.batches import Batch
from graftlm.models.fusing.fp8 import Fp8Products
from graftlm.objectives.base import Objective
from graftlm.training.step import to_device

LARGEST_CHANGE = 0.01
"""Of the loss, relative to that in 16 bits."""
LEAST_COSINE = 0.95
"""Between the gradients of all trained parameters together."""


@dataclass(frozen=True)
class Fp8Check:
    """What the products in 8 bits changed on the first batch; in `plan.json`."""

    loss: float
    loss_in_16_bits: float
    change: float
    """Of the loss, relative."""
    cosine: float
    """Between the gradients."""
    largest_change: float = LARGEST_CHANGE
    least_cosine: float = LEAST_COSINE


def check_fp8(
    model: nn.Module,
    objective: Objective[Any],
    batch: Batch,
    parameters: Mapping[str, nn.Parameter],
    part: Fp8Products,
) -> Fp8Check:
    """Loss and gradients of one batch, with and without products in 8 bits; nothing is changed.

    Raises:
        TrainingError: they differ by more than is allowed.
    """
    random_state = capture_rng()
    losses, gradients = [], []
    for use in (part.in_use, nullcontext):
        restore_rng(random_state)  # the same dropout
        with use():
            loss, gradient = _loss_and_gradient(model, objective, batch, parameters)
        losses.append(loss / max(1, batch.target_tokens))
        gradients.append(gradient)
    restore_rng(random_state)
    in_8, in_16 = losses
    size = float(gradients[0].norm() * gradients[1].norm())
    cosine = float(gradients[0] @ gradients[1]) / size if size else 1.0
    found = Fp8Check(in_8, in_16, abs(in_8 - in_16) / max(abs(in_16), 1e-9), cosine)
    if not (found.change <= LARGEST_CHANGE and found.cosine >= LEAST_COSINE):
        raise TrainingError(
            f"In FP8 the loss of the first batch is {in_8:.4f}, in 16 bits {in_16:.4f} "
            f"({100 * found.change:.2f} % apart; gradients have the cosine {found.cosine:.4f}).",
            meaning=f"At most {100 * LARGEST_CHANGE:g} % and at least {LEAST_COSINE} are allowed: this base "
            "loses too much in 8-bit products.",
            fix="Leave model.products out; the base can stay in fp8.",
        )
    return found


def _loss_and_gradient(
    model: nn.Module, objective: Objective[Any], batch: Batch, parameters: Mapping[str, nn.Parameter]
) -> tuple[float, Tensor]:
    """The loss sum and the gradients of all parameters in one vector."""
    device = next(iter(parameters.values())).device
    parts = objective(model, to_device(batch, device))
    held = list(parameters.values())
    found = torch.autograd.grad(parts.loss_sum, held, allow_unused=True)
    flat = [grad.float().flatten() for grad in found if grad is not None]
    return float(parts.loss_sum.detach()), torch.cat(flat)
