"""How a run takes its steps: loss, faster parts and recomputation, settled before the first of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from graftlm.core.allocation import freed_memory_kept
from graftlm.models.fusing.fused import Fusable, fusable, fused
from graftlm.models.recompute.policy import Policy, recomputing
from graftlm.models.streaming.streamed import RESIDENT, placement_of
from graftlm.objectives.base import Objective
from graftlm.quant.facts import device_of
from graftlm.training.recipe import Recipe
from graftlm.training.recompute import RecomputeChoice
from graftlm.verbs.recompute import choose_recompute


@dataclass(frozen=True)
class StepSetup:
    """What `graft tune` decides about the steps of a run; benchmarks decide by the same function."""

    model: nn.Module
    objective: Objective[Any]
    fusable: Fusable
    recompute: RecomputeChoice

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, training steps of the model run as decided; outside, it is as before."""
        memory = freed_memory_kept() if self._has_room else nullcontext()
        with memory, fused(self.fusable), recomputing(self.model, self.recompute.policy):
            yield

    @property
    def _has_room(self) -> bool:
        """Whether memory is not what decides: then freed blocks may stay, in holes of whatever size, for the
        time that it saves."""
        placement, _ = placement_of(self.model)
        is_short = self.recompute.policy not in ("nothing", "cheap") or placement != RESIDENT
        return device_of(self.model).type == "cpu" and not is_short


def step_setup(
    model: nn.Module,
    objective: Objective[Any],
    recipe: Recipe,
    *,
    tokens: int | None = None,
    started_with: Policy | None = None,
    find: Callable[[nn.Module], Fusable] = fusable,
) -> StepSetup:
    """Settle the steps of a run whose adapter is attached.

    Args:
        tokens: of the largest micro-batch; whole windows, where that is not known.
        started_with: the recomputation of a run that goes on.
        find: which faster parts there are.

    Raises:
        ConfigError: the recipe names a policy that is not possible for this model on this device.
    """
    found = find(model)
    choice = choose_recompute(model, objective, found, recipe, tokens=tokens, started_with=started_with)
    return StepSetup(model, objective, found, choice)
