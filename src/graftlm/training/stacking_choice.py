"""Whether runs should train side by side (`training.stacked`), and how many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.site import Site, base_modules
from graftlm.models.dropout import drops
from graftlm.models.recompute.policy import Policy
from graftlm.models.streaming.streamed import RESIDENT, placement_of
from graftlm.objectives.sft import SftObjective
from graftlm.objectives.together import TogetherObjective
from graftlm.training.recompute import SAFETY

LONGEST = 1024
"""Tokens of a micro-batch from which on a pass over a CPU gains too little."""
MOST = 16
"""Runs at a time: more were not measured (benchmarks/stacked.py)."""
KEEPING: tuple[Policy, ...] = ("nothing", "cheap")
"""Policies of recomputation that runs side by side can follow."""


@dataclass(frozen=True)
class StackingChoice:
    """How many runs train at the same time (1: one after the other), and why."""

    together: int
    why: str


def obstacle(model: nn.Module, objective: Any, config: MethodConfig) -> str | None:
    """Why a run with this method cannot share its passes over the base with others; None where it can.

    Args:
        model: with or without adapters.
        objective: as of the runs.

    Raises:
        TargetError: the method does not fit the model.
    """
    if not isinstance(objective, TogetherObjective):
        return "its loss is not computed for several runs at once"
    if not isinstance(config, LoraConfig | IA3Config | BottleneckConfig):
        return f"{type(config).__name__} acts on more than single layers"
    if isinstance(config, BottleneckConfig) and config.dropout:
        return "what bottleneck adapters drop depends on the tokens beside them"
    if isinstance(config, LoraConfig) and config.target_parameters:
        return "target_parameters change stacked experts, which see tokens in another order"
    if drops(model):
        return "the base drops values at random, and runs would share the random numbers"
    if isinstance(objective, SftObjective) and _changes_head(model, config):
        return "the output head is adapted, and the tokens of all go over it together"
    placement, _ = placement_of(model)
    return None if placement == RESIDENT else f"the layers of the base come from {placement} one by one"


def worth_stacking(
    tokens: Sequence[int],
    *,
    device: torch.device,
    policy: Policy,
    activation_bytes: int,
    free_bytes: int,
) -> StackingChoice:
    """How many runs should train at a time.

    Measured (benchmarks/stacked.py): with few tokens a micro-batch, most of a step is calls, small products
    and the reading of weights, and those are shared. A pass that is long by itself gains nothing.

    Args:
        tokens: of the largest micro-batch of each run.
        policy: what a run alone recomputes.
        activation_bytes: what the largest of these micro-batches keeps for backward under that policy.
        free_bytes: of the device; 0 where that is not known.

    >>> choice = worth_stacking([256] * 12, device=torch.device("cpu"), policy="nothing",
    ...     activation_bytes=2**28, free_bytes=2**33)
    >>> choice.together, choice.why
    (12, 'micro-batches of 256 tokens leave most of a pass to calls and weights, which runs share')
    """
    largest = max(tokens, default=0)
    if len(tokens) < 2:
        return StackingChoice(1, "there is one run")
    if policy not in KEEPING:
        return StackingChoice(1, f"memory is short: one run alone recomputes ({policy})")
    if device.type == "cpu" and largest > LONGEST:
        return StackingChoice(1, f"micro-batches of {largest:,} tokens keep the processor busy by themselves")
    together = min(len(tokens), MOST)
    if free_bytes:
        room = int(SAFETY * free_bytes) // max(1, activation_bytes)
        if room < together:
            together = max(1, room)
            return StackingChoice(together, f"memory has room for the activations of {together}")
    why = f"micro-batches of {largest:,} tokens leave most of a pass to calls and weights, which runs share"
    return StackingChoice(together, why)


def _changes_head(model: Any, config: MethodConfig) -> bool:
    """Whether the method acts on the layer that ends in the vocabulary."""
    head = model.get_output_embeddings()
    base = head.base_layer if isinstance(head, Site) else head
    paths = {path for path, module in base_modules(model).items() if module is base}
    return not paths.isdisjoint(config.places(model))
