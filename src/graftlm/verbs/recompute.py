"""Which activations a run recomputes: asked of its real step, and remembered in its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from torch import nn

from graftlm.models.fusing.fused import Fusable, fused
from graftlm.models.recompute.policy import Policy
from graftlm.objectives.base import LossParts, Objective
from graftlm.quant.facts import device_of
from graftlm.training.recipe import Recipe
from graftlm.training.recompute import RecomputeChoice, choose
from graftlm.training.step import to_device

_BEFORE = {"keep": "nothing", "recompute": "everything"}
"""What plans of earlier versions call two of the policies."""


def choose_recompute(
    model: nn.Module,
    objective: Objective[Any],
    found: Fusable,
    recipe: Recipe,
    *,
    tokens: int | None = None,
    started_with: Policy | None = None,
) -> RecomputeChoice:
    """The policy for the steps of a run whose adapter is attached.

    Args:
        tokens: of the largest micro-batch; whole windows, where that is not known.
        started_with: the policy of a run that goes on.

    Raises:
        ConfigError: the recipe names a policy that is not possible for this model on this device.
    """

    def loss_of(length: int) -> LossParts:
        return objective(model, to_device(objective.probe(length), device_of(model)))

    tokens = tokens or recipe.train.per_device_train_batch_size * recipe.data.max_length
    with fused(found):
        return choose(model, loss_of, recipe.train, tokens=tokens, started_with=started_with)


def policy_of_plan(plan: Path, part: str | None = None) -> Policy | None:
    """What a run, or the task `part` of several, began with, by its plan; None where there is none yet."""
    if not plan.is_file():
        return None
    content = json.loads(plan.read_text(encoding="utf-8"))
    named = (content if part is None else content.get("parts", {}).get(part, {})).get("recompute")
    named = _BEFORE.get(named, named)
    return named if named in get_args(Policy) else None
